// Top-k and log-softmax of the draft's logits in one reading.
//
// A row is split over blocks, a split over warps, in order of token ids. Each warp keeps the best
// k of its part and the sum of its exponentials; a block merges its warps, and a second kernel
// (merge_kernel, or that of expand_logits) the blocks. No counter and no other state outlives the
// two: a CUDA graph can replay them in any order with others.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "draft_splits.h"

namespace vllm_eagle3 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
static_assert(kWarps * kMaxChildren <= kThreads, "for_each_rank compares all lists of a block");

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// The logits of ids first .. first + kSize - 1; -inf where there is no such id.
template <typename T>
__device__ __forceinline__ void load(const T* row, int first, int vocab,
                                     float (&x)[Vector<T>::kSize]) {
  constexpr int E = Vector<T>::kSize;
  if (first >= 0 && first + E <= vocab) {
    union {
      uint4 words;
      Vector<T> logits;
    } raw;
    raw.words = __ldg(reinterpret_cast<const uint4*>(row + first));
#pragma unroll
    for (int j = 0; j < E; ++j) x[j] = to_float(raw.logits.at[j]);
  } else {
#pragma unroll
    for (int j = 0; j < E; ++j) {
      const int id = first + j;
      x[j] = id >= 0 && id < vocab ? to_float(row[id]) : -INFINITY;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) split_kernel(const DraftTopkParams p) {
  constexpr int E = Vector<T>::kSize;
  const int row_number = blockIdx.x / p.num_splits;
  const int split = blockIdx.x % p.num_splits;
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const T* row = static_cast<const T*>(p.logits) + row_number * p.row_stride;

  // Vector v holds the ids v * E - skew and on, so that all whole vectors are aligned.
  const int skew = reinterpret_cast<uintptr_t>(row) % sizeof(Vector<T>) / sizeof(T);
  const int num_vectors = (p.vocab + skew + E - 1) / E;
  const int num_parts = p.num_splits * kWarps;
  const int vectors_per_part = (num_vectors + num_parts * kWarp - 1) / (num_parts * kWarp) * kWarp;
  const int begin = (split * kWarps + warp) * vectors_per_part;
  const int end = min(begin + vectors_per_part, num_vectors);

  WarpBest best;
  SoftmaxSum sum;
  float next[E];
  if (begin < end) load<T>(row, (begin + lane) * E - skew, p.vocab, next);
  for (int v = begin; v < end; v += kWarp) {
    const int first = (v + lane) * E - skew;
    float x[E];
#pragma unroll
    for (int j = 0; j < E; ++j) x[j] = next[j];
    if (v + kWarp < end) load<T>(row, first + kWarp * E, p.vocab, next);

    float top = x[0];
#pragma unroll
    for (int j = 1; j < E; ++j) top = fmaxf(top, x[j]);
    sum.add(x, top);
    if (!best.admits(key_of(top), p.k)) continue;
    uint32_t keys[E];
    int ids[E];
#pragma unroll
    for (int j = 0; j < E; ++j) {
      ids[j] = first + j;
      keys[j] = ids[j] >= 0 && ids[j] < p.vocab ? key_of(x[j]) : 0;
    }
    best.offer(keys, ids, p.k);
  }
  sum.reduce_warp();

  __shared__ Candidate lists[kWarps * kMaxChildren];
  __shared__ int list_ids[kWarps * kMaxChildren];
  __shared__ float maxima[kWarps], sums[kWarps];
  if (lane < p.k) {
    const int place = warp * p.k + lane;
    lists[place] = candidate(best.key, place);
    list_ids[place] = best.id;
  }
  if (lane == 0) {
    maxima[warp] = sum.max;
    sums[warp] = sum.sum;
  }
  __syncthreads();
  // Lane i of each warp takes the sum of warp i.
  SoftmaxSum total;
  if (lane < kWarps) total = SoftmaxSum{maxima[lane], sums[lane]};
  total.reduce_warp();

  const bool wants_splits = p.num_splits > 1 || p.log_probs == nullptr;
  const int64_t part = int64_t{row_number} * p.num_splits + split;
  if (threadIdx.x == 0 && wants_splits) {
    p.partial_sums[2 * part] = total.max;
    p.partial_sums[2 * part + 1] = total.sum;
  }
  for_each_rank(lists, kWarps * p.k, [&](int i, int rank) {
    if (rank >= p.k) return;
    const uint32_t key = key_in(lists[i]);
    if (wants_splits) {
      p.partial_best[part * p.k + rank] =
          static_cast<int64_t>(static_cast<uint64_t>(key) << 32 | list_ids[i]);
    } else {
      p.log_probs[part * p.k + rank] = total.log_prob(value_of(key));
      p.tokens[part * p.k + rank] = token_of(p, list_ids[i]);
    }
  });
}

// One warp for each row.
__global__ void __launch_bounds__(kWarp) merge_kernel(const DraftTopkParams p) {
  const int row = blockIdx.x;
  merge_splits(p, row, [&](int rank, float log_prob, int64_t token) {
    p.log_probs[int64_t{row} * p.k + rank] = log_prob;
    p.tokens[int64_t{row} * p.k + rank] = token;
  });
}

}  // namespace

cudaError_t launch_draft_splits(const DraftTopkParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  const unsigned num_blocks = params.num_rows * params.num_splits;
  switch (params.type) {
    case FloatType::kFloat:
      split_kernel<float><<<num_blocks, kThreads, 0, stream>>>(params);
      break;
    case FloatType::kHalf:
      split_kernel<__half><<<num_blocks, kThreads, 0, stream>>>(params);
      break;
    case FloatType::kBFloat16:
      split_kernel<__nv_bfloat16><<<num_blocks, kThreads, 0, stream>>>(params);
      break;
  }
  return cudaGetLastError();
}

cudaError_t launch_draft_topk(const DraftTopkParams& params, cudaStream_t stream) {
  const cudaError_t error = launch_draft_splits(params, stream);
  if (error != cudaSuccess || params.num_rows == 0 || params.num_splits == 1) return error;
  merge_kernel<<<params.num_rows, kWarp, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace vllm_eagle3
