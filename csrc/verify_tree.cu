// The walk of vllm_eagle3/tree/verify.py: one warp for each request, two nodes in each lane.

#include "ops.h"
#include "warp.h"

namespace vllm_eagle3 {
namespace {

__global__ void verify_tree_kernel(const VerifyTreeParams p) {
  const int b = blockIdx.x;
  const int lane = threadIdx.x;
  const int first = p.cu_num_logits[b];
  const int length = min(p.cu_num_logits[b + 1] - first, p.num_nodes);
  const int64_t slot = length > 0 ? valid_slot(p.idx_mapping[b], p.num_slots) : -1;

  // Lane i holds node i and node i + 32; a node past the tree matches no parent.
  int64_t target[2], draft[2];
  int parent[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int node = lane + half * kWarp;
    const bool exists = node < length;
    target[half] = exists ? p.target_tokens[first + node] : 0;
    draft[half] = exists ? p.draft_tokens[first + node] : 0;
    parent[half] = !exists    ? kNoParent
                   : slot < 0 ? node - 1
                              : p.parents[slot * p.num_nodes + node];
  }

  // Place i of the path, and the token emitted there, are kept as node i is.
  int path[2] = {0, 0};
  int64_t emitted[2] = {0, 0};
  int path_len = 0;
  int node = 0;
  // Each turn accepts another node, so a corrupt tree ends the walk as well.
  while (node < kMaxNodes && path_len < length) {
    const int64_t low = __shfl_sync(kAll, target[0], node % kWarp);
    const int64_t high = __shfl_sync(kAll, target[1], node % kWarp);
    const int64_t token = node < kWarp ? low : high;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (path_len == lane + half * kWarp) {
        path[half] = node;
        emitted[half] = token;
      }
    }
    ++path_len;
    const uint64_t below = __ballot_sync(kAll, parent[0] == node && draft[0] == token);
    const uint64_t above = __ballot_sync(kAll, parent[1] == node && draft[1] == token);
    const uint64_t next = below | above << kWarp;
    node = next ? __ffsll(static_cast<long long>(next)) - 1 : kMaxNodes;
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int place = lane + half * kWarp;
    if (place < p.num_columns) p.tokens[int64_t{b} * p.num_columns + place] = emitted[half];
    if (slot >= 0 && place < p.num_nodes) p.path[slot * p.num_nodes + place] = path[half];
  }
  if (lane == 0) {
    p.num_sampled[b] = path_len;
    if (slot >= 0) p.path_len[slot] = path_len;
  }
}

}  // namespace

cudaError_t launch_verify_tree(const VerifyTreeParams& params, cudaStream_t stream) {
  if (params.num_reqs == 0) return cudaSuccess;
  verify_tree_kernel<<<params.num_reqs, kWarp, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace vllm_eagle3
