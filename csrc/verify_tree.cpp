#include <algorithm>

#include "tensors.h"

namespace vllm_eagle3 {
namespace {

void verify_tree_cpu(const VerifyTreeParams& p) {
  for (int b = 0; b < p.num_reqs; ++b) {
    const int first = p.cu_num_logits[b];
    const int length = std::min(p.cu_num_logits[b + 1] - first, p.num_nodes);
    const int64_t slot = length > 0 ? valid_slot(p.idx_mapping[b], p.num_slots) : -1;
    int path[kMaxNodes] = {};
    int64_t tokens[kMaxNodes] = {};
    int path_len = 0;
    int node = 0;
    while (node < length) {
      const int64_t token = p.target_tokens[first + node];
      path[path_len] = node;
      tokens[path_len++] = token;
      const int parent = node;
      // A child comes after its parent, so the walk ends.
      for (++node; node < length; ++node) {
        const int above = slot < 0 ? node - 1 : p.parents[slot * p.num_nodes + node];
        if (above == parent && p.draft_tokens[first + node] == token) break;
      }
    }
    p.num_sampled[b] = path_len;
    for (int i = 0; i < p.num_columns; ++i) p.tokens[int64_t{b} * p.num_columns + i] = tokens[i];
    if (slot < 0) continue;
    for (int i = 0; i < p.num_nodes; ++i) p.path[slot * p.num_nodes + i] = path[i];
    p.path_len[slot] = path_len;
  }
}

void verify_tree(const Tensor& target_tokens, const Tensor& draft_tokens, const Tensor& parents,
                 const Tensor& idx_mapping, const Tensor& cu_num_logits, const Tensor& path,
                 const Tensor& path_len, const Tensor& tokens, const Tensor& num_sampled) {
  const Call call("verify_tree", parents);
  const int64_t num_logits = target_tokens.numel();
  const int64_t num_reqs = idx_mapping.numel();
  const int64_t num_slots = parents.size(0);
  const int64_t num_nodes = parents.size(1);
  const int64_t num_columns = tokens.size(1);
  STD_TORCH_CHECK(num_columns <= num_nodes && num_nodes <= kMaxNodes,
                  "verify_tree: columns <= nodes <= 64 must hold");
  const VerifyTreeParams params{
      call.data<const int64_t>(target_tokens, "target_tokens", num_logits),
      call.integers(draft_tokens, "draft_tokens", num_logits),
      call.data<const int32_t>(parents, "parents", num_slots * num_nodes),
      call.integers(idx_mapping, "idx_mapping", num_reqs),
      call.data<const int32_t>(cu_num_logits, "cu_num_logits", num_reqs + 1),
      call.data<int32_t>(path, "path", num_slots * num_nodes),
      call.data<int32_t>(path_len, "path_len", num_slots),
      call.data<int64_t>(tokens, "tokens", num_reqs * num_columns),
      call.data<int32_t>(num_sampled, "num_sampled", num_reqs),
      static_cast<int>(num_reqs),
      static_cast<int>(num_slots),
      static_cast<int>(num_nodes),
      static_cast<int>(num_columns),
  };
  call.run(params, launch_verify_tree, verify_tree_cpu);
}

}  // namespace
}  // namespace vllm_eagle3

REGISTER_OP(verify_tree)
