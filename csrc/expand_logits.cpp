#include <vector>

#include "drafting.h"

namespace vllm_eagle3 {
namespace {

void expand_logits_cpu(const ExpandLogitsParams& params) {
  const int64_t num_children = int64_t{num_rows(params.tree)} * params.logits.k;
  std::vector<float> log_probs(num_children);
  std::vector<int64_t> tokens(num_children);
  ExpandLogitsParams p = params;
  p.logits.log_probs = log_probs.data();
  p.logits.tokens = tokens.data();
  p.tree.log_probs = log_probs.data();
  p.tree.tokens = tokens.data();
  draft_topk_cpu(p.logits);
  expand_tree_cpu(p.tree);
}

void expand_logits(const Tensor& pool_tokens, const Tensor& pool_scores,
                   const Tensor& pool_parents, const Tensor& frontier_scores,
                   const Tensor& frontier_index, const Tensor& frontier_bits,
                   const Tensor& frontier_row, const std::optional<Tensor>& fixed,
                   const Tensor& logits, const std::optional<Tensor>& offsets,
                   const Tensor& partial_best, const Tensor& partial_sums, int64_t level,
                   int64_t num_reqs, const Tensor& root_positions, int64_t max_position,
                   const Tensor& input_ids, const Tensor& positions) {
  const Call call("expand_logits", pool_tokens);
  ExpandLogitsParams params{
      draft_topk_params(call, logits, offsets, partial_best, partial_sums),
      expand_tree_params(call, pool_tokens, pool_scores, pool_parents, frontier_scores,
                         frontier_index, frontier_bits, frontier_row, fixed, level, num_reqs,
                         root_positions, max_position, input_ids, positions),
  };
  STD_TORCH_CHECK(params.logits.k == params.tree.growth.top_k &&
                      params.logits.num_rows >= num_rows(params.tree),
                  "expand_logits: logits must have a row for each node of the frontier, and "
                  "partial_best room for top_k of it");
  params.logits.num_rows = num_rows(params.tree);
  call.run(params, launch_expand_logits, expand_logits_cpu);
}

}  // namespace
}  // namespace vllm_eagle3

REGISTER_OP(expand_logits)
