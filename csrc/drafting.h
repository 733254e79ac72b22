// What the operations that start from logits and those that start from children share.

#pragma once

#include <optional>

#include "tensors.h"

namespace vllm_eagle3 {

// Without places for the results. k is the last dimension of `partial_best`.
DraftTopkParams draft_topk_params(const Call& call, const Tensor& logits,
                                  const std::optional<Tensor>& offsets, const Tensor& partial_best,
                                  const Tensor& partial_sums);
void draft_topk_cpu(const DraftTopkParams& params);

// Without the children.
ExpandTreeParams expand_tree_params(const Call& call, const Tensor& pool_tokens,
                                    const Tensor& pool_scores, const Tensor& pool_parents,
                                    const Tensor& frontier_scores, const Tensor& frontier_index,
                                    const Tensor& frontier_bits, const Tensor& frontier_row,
                                    const std::optional<Tensor>& fixed, int64_t level,
                                    int64_t num_reqs, const Tensor& root_positions,
                                    int64_t max_position, const Tensor& input_ids,
                                    const Tensor& positions);
void expand_tree_cpu(const ExpandTreeParams& params);

// Rows of the draft's last forward at this level.
inline int num_rows(const ExpandTreeParams& params) {
  return params.level == 1 ? params.num_reqs : params.num_reqs * params.growth.top_k;
}

}  // namespace vllm_eagle3
