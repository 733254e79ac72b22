#include "tensors.h"

namespace vllm_eagle3 {
namespace {

void permute(const AcceptedRowIndexParams& p, int root, int length) {
  int64_t ids[kMaxNodes];
  for (int i = 0; i < length; ++i) ids[i] = p.token_ids[p.index[root + i]];
  for (int i = 0; i < length; ++i) p.token_ids.set(root + i, ids[i]);
}

void accepted_row_index_cpu(const AcceptedRowIndexParams& p) {
  for (int row = 0; row < p.num_tokens; ++row) p.index[row] = row;
  for (int b = 0; b < p.batch.num_reqs; ++b) {
    const RequestRows rows(p.batch, b);
    const int64_t slot = valid_slot(p.batch.idx_mapping[b], p.paths.num_slots);
    if (slot < 0) continue;
    const int num_places = p.paths.places(slot, rows.length);
    for (int i = 0; i < num_places; ++i) {
      p.index[rows.root + i] = rows.root + p.paths.node(slot, i, rows.length);
    }
    if (p.token_ids.data != nullptr) permute(p, rows.root, num_places);
  }
}

void accepted_row_index(const Tensor& path, const Tensor& path_len, const Tensor& idx_mapping,
                        const Tensor& query_start_loc, const Tensor& cu_num_logits,
                        const Tensor& index, const std::optional<Tensor>& token_ids) {
  const Call call("accepted_row_index", path);
  const int64_t num_tokens = index.numel();
  const AcceptedRowIndexParams params{
      call.paths(path, path_len),
      call.batch_rows(idx_mapping, query_start_loc, cu_num_logits),
      call.data<int64_t>(index, "index", num_tokens),
      token_ids ? call.integers(*token_ids, "token_ids", 0) : Integers{},
      static_cast<int>(num_tokens),
  };
  call.run(params, launch_accepted_row_index, accepted_row_index_cpu);
}

}  // namespace
}  // namespace vllm_eagle3

REGISTER_OP(accepted_row_index)
