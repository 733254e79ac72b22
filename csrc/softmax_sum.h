// The sum of exponentials of a row of logits, from any number of parts.

#pragma once

#include "ordering.h"

namespace vllm_eagle3 {

// exp(logits - max) summed. NaN and +inf make the sum NaN, and so every log-probability.
struct SoftmaxSum {
  float max = -INFINITY;
  float sum = 0.0f;

  // What may be subtracted from logits: not -inf, of which exp(-inf + inf) would be NaN.
  __device__ __forceinline__ float shift() const { return max == -INFINITY ? 0.0f : max; }

  // Makes the maximum at least this.
  __device__ __forceinline__ void raise(float least_max) {
    const float before = max;
    max = fmaxf(max, least_max);
    sum *= __expf(before - shift());
  }

  // `top` is the greatest of x.
  template <int E>
  __device__ __forceinline__ void add(const float (&x)[E], float top) {
    raise(top);
#pragma unroll
    for (int j = 0; j < E; ++j) sum += __expf(x[j] - shift());
  }

  __device__ __forceinline__ void merge(const SoftmaxSum& other) {
    raise(other.max);
    sum += other.sum * __expf(other.max - shift());
  }

  // Leaves the warp's sum in all of its lanes, to the last bit the same.
  __device__ __forceinline__ void reduce_warp() {
    raise(value_of(__reduce_max_sync(kAll, key_of(max))));
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kAll, sum, offset);
    }
  }

  // The difference first: of large logits, max + log(sum) would lose the digits of the sum.
  __device__ __forceinline__ float log_prob(float x) const { return (x - shift()) - logf(sum); }
};

}  // namespace vllm_eagle3
