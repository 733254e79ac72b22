// vllm_eagle3/tree/rerank.py and chain.py: one block for each request.

#include "ops.h"
#include "ordering.h"

namespace vllm_eagle3 {
namespace {

constexpr int kMaxPool = 4160;  // top_k = 64 and depth = 2

// The nodes of a request's tree, while it is built. A detached node has kNoParent.
struct Nodes {
  int64_t tokens[kMaxNodes];
  float scores[kMaxNodes];
  int parents[kMaxNodes];
};

// Follows the best child from the root: writes the chain's nodes, the root first, and returns its
// length without the root. One warp calls; lane i looks at the nodes i and i + 32.
__device__ int best_chain(const Nodes& nodes, int max_length, int* chain) {
  const int lane = threadIdx.x;
  int node = 0;
  int length = 0;
  if (lane == 0) chain[0] = 0;
  while (length < max_length) {
    const uint64_t low = __ballot_sync(kAll, lane > 0 && nodes.parents[lane] == node);
    const uint64_t high = __ballot_sync(kAll, nodes.parents[lane + kWarp] == node);
    const uint64_t children = low | high << kWarp;
    if (children == 0) break;
    node = __ffsll(static_cast<long long>(children)) - 1;
    ++length;
    if (lane == 0) chain[length] = node;
  }
  return length;
}

// A thread holds E of the candidates.
template <int E>
__global__ void build_tree_kernel(const BuildTreeParams p) {
  const int b = blockIdx.x;
  const int thread = threadIdx.x;
  const int64_t pool = int64_t{b} * p.num_candidates;

  __shared__ OrderScratch scratch;
  __shared__ Candidate order[kMaxBest];
  __shared__ uint8_t node_of[kMaxPool];  // 0, the root, for candidates that are not kept
  uint32_t keys[E];
#pragma unroll
  for (int j = 0; j < E; ++j) {
    const int i = j * static_cast<int>(blockDim.x) + thread;
    keys[j] = 0;
    if (i >= p.num_offered) continue;
    keys[j] = key_of(p.pool_scores[pool + i]);
    node_of[i] = 0;
  }
  if (p.kept == nullptr) {
    order_best<E>(keys, p.num_offered, p.num_kept, scratch, order);
  } else {
    __syncthreads();
  }

  // Thread i makes node i.
  __shared__ Nodes nodes;
  const bool is_kept = 1 <= thread && thread <= p.num_kept;
  int pool_parent = kNoParent;
  if (thread < kMaxNodes) {
    nodes.tokens[thread] = 0;
    nodes.scores[thread] = 0.0f;
    nodes.parents[thread] = kNoParent;
  }
  if (is_kept) {
    const int index = p.kept == nullptr ? index_in(order[thread - 1])
                                        : static_cast<int>(p.kept[thread - 1]);
    node_of[index] = thread;
    nodes.tokens[thread] = p.pool_tokens[pool + index];
    nodes.scores[thread] = p.pool_scores[pool + index];
    pool_parent = p.pool_parents[pool + index];
  }
  __syncthreads();
  if (is_kept) nodes.parents[thread] = pool_parent < 0 ? 0 : node_of[pool_parent];
  __syncthreads();

  const int64_t slot = valid_slot(p.slots[b], p.num_slots);
  const bool is_chain = slot >= 0 && p.chain_only[slot];
  __shared__ int chain[kMaxNodes];
  __shared__ int chain_length;
  if (is_chain) {
    if (thread < kWarp) {
      const int length = best_chain(nodes, min(p.level, p.num_kept), chain);
      if (thread == 0) chain_length = length;
    }
    __syncthreads();
  }
  if (thread >= p.num_nodes) return;

  int source = thread;
  int parent = nodes.parents[thread];
  int depth = thread > 0;
  uint64_t bits = uint64_t{1} << thread | 1;
  if (is_chain) {
    const bool is_on_chain = thread <= chain_length;
    source = is_on_chain ? chain[thread] : -1;
    parent = is_on_chain ? thread - 1 : kNoParent;
    if (is_on_chain) {
      depth = thread;
      bits |= (uint64_t{1} << thread) - 1;
    }
  } else {
    // A parent comes before its children; in a pool that nobody filled it may not, and a loop
    // would hang the GPU.
    for (int above = parent, below = thread; 0 < above && above < below;) {
      ++depth;
      bits |= uint64_t{1} << above;
      below = above;
      above = nodes.parents[above];
    }
  }
  const int64_t token = source < 0 ? 0 : nodes.tokens[source];
  if (thread > 0) p.draft_tokens[b * p.draft_stride + thread - 1] = token;
  if (slot < 0) return;
  const int64_t at = slot * p.num_nodes + thread;
  p.tokens[at] = token;
  p.parents[at] = parent;
  p.depths[at] = depth;
  p.ancestor_bits[at] = static_cast<int64_t>(bits);
  p.scores[at] = source < 0 ? 0.0f : nodes.scores[source];
}

}  // namespace

cudaError_t launch_build_tree(const BuildTreeParams& params, cudaStream_t stream) {
  if (params.num_reqs == 0) return cudaSuccess;
  const int count = params.num_offered;
  const int num_threads = count <= 256 ? 256 : count <= 512 ? 512 : 1024;
  if (count <= num_threads) {
    build_tree_kernel<1><<<params.num_reqs, num_threads, 0, stream>>>(params);
  } else {
    build_tree_kernel<5><<<params.num_reqs, num_threads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace vllm_eagle3
