// One level of vllm_eagle3/tree/expand.py: one block for each request.

#include "ops.h"
#include "ordering.h"

namespace vllm_eagle3 {
namespace {

constexpr int kMaxTopK = 64;

// As _log_probability in vllm_eagle3/tree/expand.py: never NaN, never above 0.
__device__ __forceinline__ float log_probability(float x) {
  return x != x ? -INFINITY : fminf(x, 0.0f);
}

// A thread holds E of the level's candidates.
template <int E>
__global__ void expand_tree_kernel(const ExpandTreeParams p) {
  const Growth& g = p.growth;
  const int K = g.top_k;
  const int b = blockIdx.x;
  const int thread = threadIdx.x;
  const bool is_first = p.level == 1;
  const int num_new = is_first ? K : K * K;
  const int offered = is_first ? 0 : pool_size(p.level - 1, K);
  const int64_t pool = int64_t{b} * g.num_candidates + offered;
  const int64_t frontier = int64_t{b} * K;
  const int64_t children = int64_t{b} * num_new;

  // The frontier is overwritten below.
  __shared__ float parent_scores[kMaxTopK];
  __shared__ int parent_index[kMaxTopK];
  __shared__ int64_t parent_bits[kMaxTopK];
  if (thread < K) {
    parent_scores[thread] = is_first ? 0.0f : g.frontier_scores[frontier + thread];
    parent_index[thread] = is_first ? kNoParent : g.frontier_index[frontier + thread];
    parent_bits[thread] = is_first ? 0 : g.frontier_bits[frontier + thread];
  }
  __syncthreads();

  uint32_t keys[E];
#pragma unroll
  for (int j = 0; j < E; ++j) {
    const int i = j * static_cast<int>(blockDim.x) + thread;
    keys[j] = 0;
    if (i >= num_new) continue;
    const float score = parent_scores[i / K] + log_probability(p.log_probs[children + i]);
    g.scores[pool + i] = score;
    g.tokens[pool + i] = p.tokens[children + i];
    g.parents[pool + i] = parent_index[i / K];
    keys[j] = key_of(score);
  }

  // All of the root's children are the first frontier, in their own order.
  __shared__ OrderScratch scratch;
  __shared__ Candidate order[kMaxBest];
  if (is_first) {
    if (thread < K) order[thread] = candidate(keys[0], thread);
    __syncthreads();
  } else {
    order_best<E>(keys, num_new, K, scratch, order);
  }

  if (thread >= K) return;
  const int best = index_in(order[thread]);
  const int parent = is_first ? 0 : best / K;
  const int number = (p.level - 1) * K + thread;
  const int64_t own_bit = number < 64 ? static_cast<int64_t>(uint64_t{1} << number) : 0;
  const int64_t at = frontier + thread;
  g.frontier_scores[at] = value_of(key_in(order[thread]));
  g.frontier_index[at] = offered + best;
  g.frontier_bits[at] = parent_bits[parent] | own_bit;
  g.frontier_row[at] = is_first ? b : frontier + parent;

  const int64_t token = p.tokens[children + best];
  if (p.ids_are_int64) {
    static_cast<int64_t*>(p.input_ids)[at] = token;
  } else {
    static_cast<int32_t*>(p.input_ids)[at] = static_cast<int32_t>(token);
  }
  const int64_t position = p.root_positions[b] + p.level - 1;
  p.positions[at] = position < p.max_position ? position : p.max_position;
}

}  // namespace

cudaError_t launch_expand_tree(const ExpandTreeParams& params, cudaStream_t stream) {
  if (params.num_reqs == 0) return cudaSuccess;
  const int K = params.growth.top_k;
  const int num_new = params.level == 1 ? K : K * K;
  const int num_threads = num_new <= 256 ? 256 : num_new <= 512 ? 512 : 1024;
  if (num_new <= num_threads) {
    expand_tree_kernel<1><<<params.num_reqs, num_threads, 0, stream>>>(params);
  } else {
    expand_tree_kernel<4><<<params.num_reqs, num_threads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace vllm_eagle3
