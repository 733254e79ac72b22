// One block for each request, and one that clears what padded graphs read past the batch.

#include "ops.h"

namespace vllm_eagle3 {
namespace {

constexpr int kThreads = 128;

__global__ void gather_tree_rows_kernel(const GatherTreeRowsParams p) {
  const int b = blockIdx.x;
  const int thread = threadIdx.x;
  if (b == p.batch.num_reqs) {
    for (int i = b + thread; i < p.num_prefix_lens; i += kThreads) p.out_prefix_lens[i] = 0;
    return;
  }
  const RequestRows rows(p.batch, b);
  const bool is_empty = rows.start == rows.end;
  if (thread == 0) p.out_prefix_lens[b] = is_empty ? 0 : p.seq_lens[b] - rows.length;
  if (is_empty) return;
  for (int row = rows.start + thread; row < rows.root; row += kThreads) {
    p.out_positions[row] = p.linear_positions[row];
    p.out_bits[row] = 0;
  }
  const TreeRows tree(p, b, rows.length);
  if (thread >= tree.length) return;
  p.out_bits[rows.root + thread] = tree.bits(thread);
  p.out_positions[rows.root + thread] = p.linear_positions[rows.root] + tree.depth(thread);
}

}  // namespace

cudaError_t launch_gather_tree_rows(const GatherTreeRowsParams& params, cudaStream_t stream) {
  static_assert(kThreads >= kMaxNodes, "a thread for each node");
  gather_tree_rows_kernel<<<params.batch.num_reqs + 1, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace vllm_eagle3
