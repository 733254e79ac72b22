#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "tensors.h"

namespace vllm_eagle3 {
namespace {

constexpr int kMaxPool = 4160;

void build_tree_cpu(const BuildTreeParams& p) {
  std::vector<int> order(p.num_offered);
  std::vector<int> node_of(p.num_offered);
  for (int b = 0; b < p.num_reqs; ++b) {
    const int64_t pool = int64_t{b} * p.num_candidates;
    const float* pool_scores = p.pool_scores + pool;
    if (p.kept != nullptr) {
      std::copy_n(p.kept, p.num_kept, order.begin());
    } else {
      std::iota(order.begin(), order.end(), 0);
      std::partial_sort(order.begin(), order.begin() + p.num_kept, order.end(), [&](int i, int j) {
        return pool_scores[i] != pool_scores[j] ? pool_scores[i] > pool_scores[j] : i < j;
      });
    }

    // The tree of kept candidates; nodes past them are detached.
    std::fill(node_of.begin(), node_of.end(), 0);
    int64_t tokens[kMaxNodes] = {};
    float scores[kMaxNodes] = {};
    int parents[kMaxNodes];
    std::fill_n(parents, kMaxNodes, kNoParent);
    for (int node = 1; node <= p.num_kept; ++node) {
      const int index = order[node - 1];
      const int parent = p.pool_parents[pool + index];
      node_of[index] = node;
      tokens[node] = p.pool_tokens[pool + index];
      scores[node] = pool_scores[index];
      parents[node] = parent < 0 ? 0 : node_of[parent];
    }

    const int64_t slot = valid_slot(p.slots[b], p.num_slots);
    if (slot >= 0 && p.chain_only[slot]) {
      // A child comes after its parent, so the chain's nodes only move to the front.
      int length = 0;
      for (int node = 1, above = 0; node <= p.num_kept && length < p.level; ++node) {
        if (parents[node] != above) continue;
        above = node;
        ++length;
        tokens[length] = tokens[node];
        scores[length] = scores[node];
      }
      for (int node = 1; node < kMaxNodes; ++node) {
        const bool is_on_chain = node <= length;
        parents[node] = is_on_chain ? node - 1 : kNoParent;
        if (is_on_chain) continue;
        tokens[node] = 0;
        scores[node] = 0.0f;
      }
    }

    int depths[kMaxNodes] = {};
    uint64_t bits[kMaxNodes] = {1};
    for (int node = 0; node < p.num_nodes; ++node) {
      if (node > 0) {
        const int above = std::max(parents[node], 0);
        depths[node] = depths[above] + 1;
        bits[node] = bits[above] | uint64_t{1} << node;
        p.draft_tokens[b * p.draft_stride + node - 1] = tokens[node];
      }
      if (slot < 0) continue;
      const int64_t at = slot * p.num_nodes + node;
      p.tokens[at] = tokens[node];
      p.parents[at] = parents[node];
      p.depths[at] = depths[node];
      p.ancestor_bits[at] = static_cast<int64_t>(bits[node]);
      p.scores[at] = scores[node];
    }
  }
}

void build_tree(const Tensor& pool_tokens, const Tensor& pool_scores, const Tensor& pool_parents,
                const std::optional<Tensor>& kept, int64_t num_offered, int64_t level,
                int64_t num_reqs, const Tensor& slots, const Tensor& chain_only,
                const Tensor& tokens, const Tensor& parents, const Tensor& depths,
                const Tensor& ancestor_bits, const Tensor& scores, const Tensor& draft_tokens) {
  const Call call("build_tree", pool_tokens);
  const int64_t num_candidates = pool_tokens.size(1);
  const int64_t num_slots = tokens.size(0);
  const int64_t num_nodes = tokens.size(1);
  STD_TORCH_CHECK(2 <= num_nodes && num_nodes <= kMaxNodes,
                  "build_tree: a tree has between 2 and 64 nodes");
  const int64_t num_eligible = kept ? kept->numel() : num_offered;
  STD_TORCH_CHECK(1 <= num_eligible && num_eligible <= num_offered &&
                      num_offered <= num_candidates && num_offered <= kMaxPool && level >= 1 &&
                      num_reqs >= 0,
                  "build_tree: more candidates than the pool holds, or than 4160");
  STD_TORCH_CHECK(draft_tokens.dim() == 2 && draft_tokens.stride(1) == 1 &&
                      draft_tokens.size(0) >= num_reqs && draft_tokens.size(1) >= num_nodes - 1 &&
                      draft_tokens.scalar_type() == ScalarType::Long,
                  "build_tree: draft_tokens must be int64 with room for all nodes");
  const int64_t num_pool = num_reqs * num_candidates;
  const int64_t num_stored = num_slots * num_nodes;
  const BuildTreeParams params{
      call.data<const int64_t>(pool_tokens, "pool_tokens", num_pool),
      call.data<const float>(pool_scores, "pool_scores", num_pool),
      call.data<const int32_t>(pool_parents, "pool_parents", num_pool),
      kept ? call.data<const int64_t>(*kept, "kept", 0) : nullptr,
      call.integers(slots, "slots", num_reqs),
      call.data<const bool>(chain_only, "chain_only", num_slots),
      call.data<int64_t>(tokens, "tokens", num_stored),
      call.data<int32_t>(parents, "parents", num_stored),
      call.data<int32_t>(depths, "depths", num_stored),
      call.data<int64_t>(ancestor_bits, "ancestor_bits", num_stored),
      call.data<float>(scores, "scores", num_stored),
      static_cast<int64_t*>(call.strided(draft_tokens, "draft_tokens", 0)),
      draft_tokens.stride(0),
      static_cast<int>(num_candidates),
      static_cast<int>(num_offered),
      static_cast<int>(std::min(num_nodes - 1, num_eligible)),
      static_cast<int>(level),
      static_cast<int>(num_reqs),
      static_cast<int>(num_slots),
      static_cast<int>(num_nodes),
  };
  call.run(params, launch_build_tree, build_tree_cpu);
}

}  // namespace
}  // namespace vllm_eagle3

REGISTER_OP(build_tree)
