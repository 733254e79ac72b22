// One level of vllm_eagle3/tree/expand.py: one block for each request.

#include "draft_splits.h"

namespace vllm_eagle3 {
namespace {

constexpr int kMaxTopK = 64;

// As _log_probability in vllm_eagle3/tree/expand.py: never NaN, never above 0.
__device__ __forceinline__ float log_probability(float x) {
  return x != x ? -INFINITY : fminf(x, 0.0f);
}

// The frontier that a level grows from, kept because the next one takes its place.
struct Parents {
  float scores[kMaxTopK];
  int index[kMaxTopK];
  int64_t bits[kMaxTopK];
};

__device__ __forceinline__ void load_parents(const ExpandTreeParams& p, Parents& parents) {
  const Growth& g = p.growth;
  const bool is_first = p.level == 1;
  const int k = threadIdx.x;
  if (k >= g.top_k) return;
  const int64_t at = int64_t{blockIdx.x} * g.top_k + k;
  parents.scores[k] = is_first ? 0.0f : g.frontier_scores[at];
  parents.index[k] = is_first ? kNoParent : g.frontier_index[at];
  parents.bits[k] = is_first ? 0 : g.frontier_bits[at];
}

// Offers the children of a request and chooses the next frontier. The whole block calls; a thread
// holds E of the children.
template <int E>
__device__ void expand(const ExpandTreeParams& p, const Parents& parents, const float* log_probs,
                       const int64_t* tokens) {
  const Growth& g = p.growth;
  const int K = g.top_k;
  const int b = blockIdx.x;
  const int thread = threadIdx.x;
  const bool is_first = p.level == 1;
  const int num_new = is_first ? K : K * K;
  const int offered = is_first ? 0 : pool_size(p.level - 1, K);
  const int64_t pool = int64_t{b} * g.num_candidates + offered;

  uint32_t keys[E];
#pragma unroll
  for (int j = 0; j < E; ++j) {
    const int i = j * static_cast<int>(blockDim.x) + thread;
    keys[j] = 0;
    if (i >= num_new) continue;
    const float score = parents.scores[i / K] + log_probability(log_probs[i]);
    g.scores[pool + i] = score;
    g.tokens[pool + i] = tokens[i];
    g.parents[pool + i] = parents.index[i / K];
    keys[j] = key_of(score);
  }

  // Of the root's children all go on: in their own order, or in the one that is fixed.
  __shared__ OrderScratch scratch;
  __shared__ Candidate order[kMaxBest];
  if (p.fixed == nullptr && !is_first) order_best<E>(keys, num_new, K, scratch, order);

  if (thread >= K) return;
  int best = thread;
  if (p.fixed != nullptr) {
    best = static_cast<int>(p.fixed[thread]);
  } else if (!is_first) {
    best = index_in(order[thread]);
  }
  const int parent = is_first ? 0 : best / K;
  const int number = (p.level - 1) * K + thread;
  const int64_t own_bit = number < 64 ? static_cast<int64_t>(uint64_t{1} << number) : 0;
  const int64_t frontier = int64_t{b} * K;
  const int64_t at = frontier + thread;
  g.frontier_scores[at] = parents.scores[parent] + log_probability(log_probs[best]);
  g.frontier_index[at] = offered + best;
  g.frontier_bits[at] = parents.bits[parent] | own_bit;
  g.frontier_row[at] = is_first ? b : frontier + parent;

  if (p.ids_are_int64) {
    static_cast<int64_t*>(p.input_ids)[at] = tokens[best];
  } else {
    static_cast<int32_t*>(p.input_ids)[at] = static_cast<int32_t>(tokens[best]);
  }
  const int64_t position = p.root_positions[b] + p.level - 1;
  p.positions[at] = position < p.max_position ? position : p.max_position;
}

template <int E>
__global__ void expand_tree_kernel(const ExpandTreeParams p) {
  __shared__ Parents parents;
  load_parents(p, parents);
  __syncthreads();
  const int K = p.growth.top_k;
  const int64_t children = int64_t{blockIdx.x} * (p.level == 1 ? K : K * K);
  expand<E>(p, parents, p.log_probs + children, p.tokens + children);
}

// Each warp first merges the splits of some of the request's rows.
__global__ void expand_logits_kernel(const ExpandLogitsParams p) {
  __shared__ Parents parents;
  load_parents(p.tree, parents);

  constexpr int kMaxNew = kMaxChildren * kMaxChildren;
  __shared__ float log_probs[kMaxNew];
  __shared__ int64_t tokens[kMaxNew];
  const int K = p.tree.growth.top_k;
  const int num_rows = p.tree.level == 1 ? 1 : K;
  const int num_warps = blockDim.x / kWarp;
  for (int row = threadIdx.x / kWarp; row < num_rows; row += num_warps) {
    merge_splits(p.logits, blockIdx.x * num_rows + row,
                 [&](int rank, float log_prob, int64_t token) {
                   log_probs[row * K + rank] = log_prob;
                   tokens[row * K + rank] = token;
                 });
  }
  __syncthreads();
  expand<1>(p.tree, parents, log_probs, tokens);
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

cudaError_t launch_expand_logits(const ExpandLogitsParams& params, cudaStream_t stream) {
  const cudaError_t error = launch_draft_splits(params.logits, stream);
  if (error != cudaSuccess || params.tree.num_reqs == 0) return error;
  // A warp for each row, a thread for each child.
  const int num_threads = params.tree.growth.top_k <= 8 ? 256 : 512;
  expand_logits_kernel<<<params.tree.num_reqs, num_threads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace vllm_eagle3
