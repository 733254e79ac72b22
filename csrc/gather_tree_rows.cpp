#include "tensors.h"

namespace vllm_eagle3 {
namespace {

void gather_tree_rows_cpu(const GatherTreeRowsParams& p) {
  for (int b = 0; b < p.num_prefix_lens; ++b) p.out_prefix_lens[b] = 0;
  for (int b = 0; b < p.batch.num_reqs; ++b) {
    const RequestRows rows(p.batch, b);
    if (rows.start == rows.end) continue;
    p.out_prefix_lens[b] = p.seq_lens[b] - rows.length;
    for (int row = rows.start; row < rows.root; ++row) {
      p.out_positions[row] = p.linear_positions[row];
      p.out_bits[row] = 0;
    }
    const TreeRows tree(p, b, rows.length);
    for (int node = 0; node < tree.length; ++node) {
      p.out_bits[rows.root + node] = tree.bits(node);
      p.out_positions[rows.root + node] = p.linear_positions[rows.root] + tree.depth(node);
    }
  }
}

void gather_tree_rows(const Tensor& ancestor_bits, const Tensor& depths, const Tensor& idx_mapping,
                      const Tensor& query_start_loc, const Tensor& cu_num_logits,
                      const Tensor& linear_positions, const Tensor& out_bits,
                      const Tensor& out_positions, const Tensor& out_prefix_lens,
                      const Tensor& seq_lens) {
  const Call call("gather_tree_rows", ancestor_bits);
  const int64_t num_slots = ancestor_bits.size(0);
  const int64_t num_nodes = ancestor_bits.size(1);
  const int64_t num_tokens = linear_positions.numel();
  const int64_t num_reqs = idx_mapping.numel();
  STD_TORCH_CHECK(out_prefix_lens.numel() >= num_reqs,
                  "gather_tree_rows: out_prefix_lens is shorter than the batch");
  const GatherTreeRowsParams params{
      call.data<const int64_t>(ancestor_bits, "ancestor_bits", num_slots * num_nodes),
      call.data<const int32_t>(depths, "depths", num_slots * num_nodes),
      call.batch_rows(idx_mapping, query_start_loc, cu_num_logits),
      call.data<const int64_t>(linear_positions, "linear_positions", num_tokens),
      call.data<int64_t>(out_bits, "out_bits", num_tokens),
      call.data<int64_t>(out_positions, "out_positions", num_tokens),
      call.data<int32_t>(out_prefix_lens, "out_prefix_lens", num_reqs),
      call.data<const int32_t>(seq_lens, "seq_lens", num_reqs),
      static_cast<int>(num_slots),
      static_cast<int>(num_nodes),
      static_cast<int>(out_prefix_lens.numel()),
  };
  call.run(params, launch_gather_tree_rows, gather_tree_rows_cpu);
}

}  // namespace
}  // namespace vllm_eagle3

REGISTER_OP(gather_tree_rows)
