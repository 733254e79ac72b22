// Choosing the best of many candidates: within a warp, and within a block.
//
// Everywhere, of equal candidates the one that comes first is the better. Nothing depends on the
// order in which threads happen to run.

#pragma once

#include <cstdint>

#include "warp.h"

namespace vllm_eagle3 {

// Unsigned keys order as their floats do. NaN counts as -inf; key 0 is below that of every float
// and marks an empty place.
__device__ __forceinline__ uint32_t key_of(float value) {
  if (value != value) value = -INFINITY;
  const uint32_t bits = __float_as_uint(value + 0.0f);  // the sum has no negative zero
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The best candidates that a warp has been offered: lane i holds the i-th.
struct WarpBest {
  uint32_t key = 0;
  int id = 0;

  // Whether an offer is of any use, of which this lane knows its own best key.
  __device__ __forceinline__ bool admits(uint32_t own_best, int k) const {
    return __any_sync(kAll, own_best > __shfl_sync(kAll, key, k - 1));
  }

  // Offers E candidates of each lane. Lower lanes come first, and lower places within a lane.
  // `keys` is spent. Keeps at least k.
  template <int E>
  __device__ __forceinline__ void offer(uint32_t (&keys)[E], const int (&ids)[E], int k) {
    const int lane = threadIdx.x % kWarp;
    while (true) {
      uint32_t own = keys[0];
#pragma unroll
      for (int j = 1; j < E; ++j) own = max(own, keys[j]);
      const uint32_t best = __reduce_max_sync(kAll, own);
      if (best <= __shfl_sync(kAll, key, k - 1)) return;

      const int winner = __ffs(__ballot_sync(kAll, own == best)) - 1;
      int taken = 0;
      if (lane == winner) {
        bool found = false;
#pragma unroll
        for (int j = 0; j < E; ++j) {
          if (!found && keys[j] == best) {
            found = true;
            taken = ids[j];
            keys[j] = 0;
          }
        }
      }
      taken = __shfl_sync(kAll, taken, winner);
      const int place = __popc(__ballot_sync(kAll, key >= best));
      const uint32_t key_above = __shfl_up_sync(kAll, key, 1);
      const int id_above = __shfl_up_sync(kAll, id, 1);
      if (lane > place) {
        key = key_above;
        id = id_above;
      } else if (lane == place) {
        key = best;
        id = taken;
      }
    }
  }
};

// A candidate of a block: no two are equal, and the greater is the better.
using Candidate = uint64_t;

__device__ __forceinline__ Candidate candidate(uint32_t key, int index) {
  return static_cast<uint64_t>(key) << 32 | ~static_cast<uint32_t>(index);
}
__device__ __forceinline__ uint32_t key_in(Candidate c) { return static_cast<uint32_t>(c >> 32); }
__device__ __forceinline__ int index_in(Candidate c) {
  return static_cast<int>(~static_cast<uint32_t>(c));
}

// Calls visit(i, rank of candidates[i]) once for each, in some thread. The whole block calls;
// its size is a power of two, at least a warp and at least `count`.
template <typename Visit>
__device__ __forceinline__ void for_each_rank(const Candidate* candidates, int count,
                                              Visit visit) {
  // Neighbouring threads share the comparisons of one candidate.
  int parts = kWarp;
  while (parts > 1 && parts * count > static_cast<int>(blockDim.x)) parts /= 2;
  const int i = threadIdx.x / parts;
  const Candidate own = i < count ? candidates[i] : 0;
  int rank = 0;
  for (int j = threadIdx.x % parts; j < count; j += parts) rank += candidates[j] > own;
  for (int offset = parts / 2; offset > 0; offset /= 2) {
    rank += __shfl_xor_sync(kAll, rank, offset);
  }
  if (i < count && threadIdx.x % parts == 0) visit(i, rank);
}

constexpr int kMaxBest = 64;       // as many as `order_best` can order
constexpr int kCompareAll = 128;   // up to here, comparing all with all is the fastest
constexpr int kIndexBits = 13;     // indices of candidates are below 2 ** 13

struct OrderScratch {
  Candidate kept[kCompareAll];
  int num_kept;
};

// Writes the best `num_best` of `count` candidates to `order`, best first.
//
// Thread t holds the keys of the candidates t, t + blockDim.x, ... The whole block calls, and has
// written `order` when this returns. num_best <= count, num_best <= 64, count <= blockDim.x * E;
// blockDim.x is a power of two, at least 128.
template <int E>
__device__ void order_best(const uint32_t (&keys)[E], int count, int num_best,
                           OrderScratch& scratch, Candidate* order) {
  const int thread = threadIdx.x;
  const int stride = blockDim.x;
  int num_kept = count;
  if (count <= kCompareAll) {
    if (thread < count) scratch.kept[thread] = candidate(keys[0], thread);
  } else {
    const auto count_where = [&](auto condition) {
      int found = 0;
#pragma unroll
      for (int j = 0; j < E; ++j) {
        const int i = j * stride + thread;
        if (j * stride < count) found += __syncthreads_count(i < count && condition(keys[j], i));
      }
      return found;
    };
    // The greatest threshold that num_best keys reach, bit by bit.
    uint32_t threshold = 0;
    int num_reaching = count;
    for (uint32_t bit = 1u << 31; bit != 0 && num_reaching != num_best; bit >>= 1) {
      const uint32_t trial = threshold | bit;
      const int found = count_where([=](uint32_t key, int) { return key >= trial; });
      if (found >= num_best) {
        threshold = trial;
        num_reaching = found;
      }
    }
    // If more reach it than are wanted, the first of those that equal it.
    int limit = count;
    if (num_reaching > num_best) {
      const int above = count_where([=](uint32_t key, int) { return key > threshold; });
      limit = 0;
      for (int bit = 1 << (kIndexBits - 1); bit > 0; bit >>= 1) {
        const int trial = limit | bit;
        const int found =
            count_where([=](uint32_t key, int i) { return key == threshold && i < trial; });
        if (above + found <= num_best) limit = trial;
      }
    }
    if (threadIdx.x == 0) scratch.num_kept = 0;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < E; ++j) {
      const int i = j * stride + thread;
      if (i < count && (keys[j] > threshold || (keys[j] == threshold && i < limit))) {
        scratch.kept[atomicAdd(&scratch.num_kept, 1)] = candidate(keys[j], i);
      }
    }
    num_kept = num_best;
  }
  __syncthreads();
  for_each_rank(scratch.kept, num_kept, [&](int i, int rank) {
    if (rank < num_best) order[rank] = scratch.kept[i];
  });
  __syncthreads();
}

}  // namespace vllm_eagle3
