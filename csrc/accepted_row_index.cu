// One block for each request, a thread for each place of a path, and one block for the padding.

#include "ops.h"

namespace vllm_eagle3 {
namespace {

constexpr int kThreads = kMaxNodes;

__global__ void accepted_row_index_kernel(const AcceptedRowIndexParams p) {
  const int b = blockIdx.x;
  if (b == p.batch.num_reqs) {
    const int end = p.batch.query_start_loc[b];
    for (int row = end + threadIdx.x; row < p.num_tokens; row += kThreads) p.index[row] = row;
    return;
  }
  const RequestRows rows(p.batch, b);
  const int64_t slot = valid_slot(p.batch.idx_mapping[b], p.paths.num_slots);
  const int num_places = slot < 0 ? 0 : p.paths.places(slot, rows.length);
  for (int row = rows.start + threadIdx.x; row < rows.end; row += kThreads) {
    const int place = row - rows.root;
    const bool on_path = place >= 0 && place < num_places;
    p.index[row] = on_path ? rows.root + p.paths.node(slot, place, rows.length) : row;
  }
  if (p.token_ids.data == nullptr) return;
  // In place: every id is read before any is written.
  const int place = threadIdx.x;
  const bool moves = place < num_places;
  const int64_t id =
      moves ? p.token_ids[rows.root + p.paths.node(slot, place, rows.length)] : 0;
  __syncthreads();
  if (moves) p.token_ids.set(rows.root + place, id);
}

}  // namespace

cudaError_t launch_accepted_row_index(const AcceptedRowIndexParams& params, cudaStream_t stream) {
  accepted_row_index_kernel<<<params.batch.num_reqs + 1, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace vllm_eagle3
