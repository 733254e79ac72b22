// One block for each row and norm: one for each state, or one for all states of a joint norm.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ops.h"
#include "warp.h"

namespace vllm_eagle3 {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T at[kWidth];
};

// The sum over the block, in every thread.
__device__ float block_sum(float value) {
  __shared__ float sums[kThreads / kWarp];
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += sums[warp];
  return total;
}

template <typename T, int kWidth>
__global__ void fuse_features_kernel(const FuseFeaturesParams p) {
  using Words = Vector<T, kWidth>;
  const int64_t row = blockIdx.x;
  const int64_t taken = p.index.data == nullptr ? row : p.index[row];
  const int first = p.joint_norm ? 0 : blockIdx.y;
  const int last = p.joint_norm ? p.num_states : first + 1;
  const int num_words = p.hidden_size / kWidth;

  float scale = 1.0f;
  if (p.weights[first] != nullptr) {
    float sum = 0.0f;
    for (int s = first; s < last; ++s) {
      const T* state = static_cast<const T*>(p.states[s]) + taken * p.state_strides[s];
      for (int word = threadIdx.x; word < num_words; word += kThreads) {
        const Words x = reinterpret_cast<const Words*>(state)[word];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const float value = static_cast<float>(x.at[i]);
          sum += value * value;
        }
      }
    }
    const float count = static_cast<float>((last - first) * p.hidden_size);
    scale = rsqrtf(block_sum(sum) / count + p.eps);
  }

  for (int s = first; s < last; ++s) {
    const T* state = static_cast<const T*>(p.states[s]) + taken * p.state_strides[s];
    const T* weight = static_cast<const T*>(p.weights[s]);
    T* out = static_cast<T*>(p.out) + row * p.out_stride + int64_t{s} * p.hidden_size;
    for (int word = threadIdx.x; word < num_words; word += kThreads) {
      Words x = reinterpret_cast<const Words*>(state)[word];  // from the cache, after a norm
      if (weight != nullptr) {
        const Words w = reinterpret_cast<const Words*>(weight)[word];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) x.at[i] = normed(x.at[i], scale, w.at[i]);
      }
      reinterpret_cast<Words*>(out)[word] = x;
    }
  }
}

// Whether every row of every tensor starts at a whole vector and holds whole vectors.
bool is_aligned(const FuseFeaturesParams& p, int element_bytes) {
  uint64_t bits = reinterpret_cast<uint64_t>(p.out);
  bits |= static_cast<uint64_t>(p.hidden_size | p.out_stride) * element_bytes;
  for (int s = 0; s < p.num_states; ++s) {
    bits |= reinterpret_cast<uint64_t>(p.states[s]) | reinterpret_cast<uint64_t>(p.weights[s]);
    bits |= static_cast<uint64_t>(p.state_strides[s]) * element_bytes;
  }
  return bits % kVectorBytes == 0;
}

template <typename T>
cudaError_t launch(const FuseFeaturesParams& params, cudaStream_t stream) {
  const dim3 grid(params.num_rows, params.joint_norm ? 1 : params.num_states);
  if (is_aligned(params, sizeof(T))) {
    fuse_features_kernel<T, kVectorBytes / sizeof(T)><<<grid, kThreads, 0, stream>>>(params);
  } else {
    fuse_features_kernel<T, 1><<<grid, kThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_fuse_features(const FuseFeaturesParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  switch (params.type) {
    case FloatType::kFloat: return launch<float>(params, stream);
    case FloatType::kHalf: return launch<__half>(params, stream);
    case FloatType::kBFloat16: return launch<__nv_bfloat16>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vllm_eagle3
