// The sum of exponentials of a row of logits, from any number of parts.

#pragma once

namespace vllm_eagle3 {

// exp(logits - max) summed. NaN and +inf make the sum NaN, and so every log-probability.
struct SoftmaxSum {
  float max = -INFINITY;
  float sum = 0.0f;

  // What may be subtracted from logits: not -inf, of which exp(-inf + inf) would be NaN.
  __device__ __forceinline__ float shift() const { return max == -INFINITY ? 0.0f : max; }

  // `top` is the greatest of x.
  template <int E>
  __device__ __forceinline__ void add(const float (&x)[E], float top) {
    const float before = max;
    max = fmaxf(max, top);
    sum *= __expf(before - shift());
#pragma unroll
    for (int j = 0; j < E; ++j) sum += __expf(x[j] - shift());
  }

  __device__ __forceinline__ void merge(const SoftmaxSum& other) {
    const float before = max;
    max = fmaxf(max, other.max);
    sum = sum * __expf(before - shift()) + other.sum * __expf(other.max - shift());
  }

  // Leaves the warp's sum in all of its lanes.
  __device__ __forceinline__ void reduce_warp() {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      merge(SoftmaxSum{__shfl_xor_sync(0xffffffffu, max, offset),
                       __shfl_xor_sync(0xffffffffu, sum, offset)});
    }
    // Lanes add in different orders, and round differently.
    sum = __shfl_sync(0xffffffffu, sum, 0);
  }

  // The difference first: of large logits, max + log(sum) would lose the digits of the sum.
  __device__ __forceinline__ float log_prob(float x) const { return (x - shift()) - logf(sum); }
};

}  // namespace vllm_eagle3
