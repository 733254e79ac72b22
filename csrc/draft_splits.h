// The second half of draft_topk: from the splits of a row to its best children.

#pragma once

#include "ops.h"
#include "ordering.h"
#include "softmax_sum.h"

namespace vllm_eagle3 {

__device__ __forceinline__ int64_t token_of(const DraftTopkParams& p, int id) {
  return p.offsets == nullptr ? id : id + p.offsets[id];
}

// Calls visit(rank, log_prob, token) for each of the k best children of a row, in a lane each.
// One warp calls.
template <typename Visit>
__device__ __forceinline__ void merge_splits(const DraftTopkParams& p, int row, Visit visit) {
  constexpr int E = 4;
  const int lane = threadIdx.x % kWarp;
  const int count = p.num_splits * p.k;
  const int64_t* partial = p.partial_best + int64_t{row} * count;
  uint64_t next[E];
  const auto load = [&](int begin) {
#pragma unroll
    for (int j = 0; j < E; ++j) {
      const int place = begin + lane * E + j;
      next[j] = place < count ? partial[place] : 0;
    }
  };
  // Nothing waits for these before the sums are on their way, too.
  load(0);
  SoftmaxSum sum;
  for (int split = lane; split < p.num_splits; split += kWarp) {
    const int64_t part = int64_t{row} * p.num_splits + split;
    sum.merge(SoftmaxSum{p.partial_sums[2 * part], p.partial_sums[2 * part + 1]});
  }
  sum.reduce_warp();

  WarpBest best;
  for (int begin = 0; begin < count; begin += kWarp * E) {
    uint32_t keys[E];
    int ids[E];
#pragma unroll
    for (int j = 0; j < E; ++j) {
      keys[j] = static_cast<uint32_t>(next[j] >> 32);
      ids[j] = static_cast<int>(static_cast<uint32_t>(next[j]));
    }
    load(begin + kWarp * E);
    best.offer(keys, ids, p.k);
  }
  if (lane < p.k) visit(lane, sum.log_prob(value_of(best.key)), token_of(p, best.id));
}

}  // namespace vllm_eagle3
