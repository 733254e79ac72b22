#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "drafting.h"

namespace vllm_eagle3 {
namespace {

float log_probability(float x) {
  return std::isnan(x) ? -std::numeric_limits<float>::infinity() : std::min(x, 0.0f);
}

void expand_tree(const Tensor& pool_tokens, const Tensor& pool_scores, const Tensor& pool_parents,
                 const Tensor& frontier_scores, const Tensor& frontier_index,
                 const Tensor& frontier_bits, const Tensor& frontier_row,
                 const std::optional<Tensor>& fixed, const Tensor& log_probs,
                 const Tensor& tokens, int64_t level, int64_t num_reqs,
                 const Tensor& root_positions, int64_t max_position, const Tensor& input_ids,
                 const Tensor& positions) {
  const Call call("expand_tree", pool_tokens);
  ExpandTreeParams params =
      expand_tree_params(call, pool_tokens, pool_scores, pool_parents, frontier_scores,
                         frontier_index, frontier_bits, frontier_row, fixed, level, num_reqs,
                         root_positions, max_position, input_ids, positions);
  const int64_t num_children = int64_t{num_rows(params)} * params.growth.top_k;
  params.log_probs = call.data<const float>(log_probs, "log_probs", num_children);
  params.tokens = call.data<const int64_t>(tokens, "tokens", num_children);
  call.run(params, launch_expand_tree, expand_tree_cpu);
}

}  // namespace

ExpandTreeParams expand_tree_params(const Call& call, const Tensor& pool_tokens,
                                    const Tensor& pool_scores, const Tensor& pool_parents,
                                    const Tensor& frontier_scores, const Tensor& frontier_index,
                                    const Tensor& frontier_bits, const Tensor& frontier_row,
                                    const std::optional<Tensor>& fixed, int64_t level,
                                    int64_t num_reqs, const Tensor& root_positions,
                                    int64_t max_position, const Tensor& input_ids,
                                    const Tensor& positions) {
  const int64_t C = pool_tokens.size(1);
  const int64_t K = frontier_bits.size(1);
  STD_TORCH_CHECK(1 <= K && K <= kMaxNodes, "expand_tree: top_k must be between 1 and 64");
  STD_TORCH_CHECK(0 <= num_reqs && 1 <= level && level <= C && pool_size(level, K) <= C,
                  "expand_tree: the pool has no place for this level");
  const int64_t num_pool = num_reqs * C;
  const int64_t num_frontier = num_reqs * K;
  const Integers ids = call.integers(input_ids, "input_ids", num_frontier);
  return {
      {
          call.data<int64_t>(pool_tokens, "pool_tokens", num_pool),
          call.data<float>(pool_scores, "pool_scores", num_pool),
          call.data<int32_t>(pool_parents, "pool_parents", num_pool),
          call.data<float>(frontier_scores, "frontier_scores", num_frontier),
          call.data<int32_t>(frontier_index, "frontier_index", num_frontier),
          call.data<int64_t>(frontier_bits, "frontier_bits", num_frontier),
          call.data<int64_t>(frontier_row, "frontier_row", num_frontier),
          static_cast<int>(C),
          static_cast<int>(K),
      },
      nullptr,
      nullptr,
      fixed ? call.data<const int64_t>(*fixed, "fixed", K) : nullptr,
      call.data<const int64_t>(root_positions, "root_positions", num_reqs),
      max_position,
      const_cast<void*>(ids.data),
      ids.is_int64,
      call.data<int64_t>(positions, "positions", num_frontier),
      static_cast<int>(level),
      static_cast<int>(num_reqs),
  };
}

void expand_tree_cpu(const ExpandTreeParams& p) {
  const Growth& g = p.growth;
  const int K = g.top_k;
  const bool is_first = p.level == 1;
  const int num_new = is_first ? K : K * K;
  const int offered = is_first ? 0 : pool_size(p.level - 1, K);
  std::vector<int> order(num_new);
  std::vector<int64_t> parent_bits(K);
  for (int b = 0; b < p.num_reqs; ++b) {
    const int64_t pool = int64_t{b} * g.num_candidates + offered;
    const int64_t frontier = int64_t{b} * K;
    const int64_t children = int64_t{b} * num_new;
    const float* scores = g.scores + pool;
    for (int i = 0; i < num_new; ++i) {
      const int64_t parent = frontier + i / K;
      const float log_prob = log_probability(p.log_probs[children + i]);
      g.scores[pool + i] = is_first ? log_prob : g.frontier_scores[parent] + log_prob;
      g.tokens[pool + i] = p.tokens[children + i];
      g.parents[pool + i] = is_first ? kNoParent : g.frontier_index[parent];
    }
    std::iota(order.begin(), order.end(), 0);
    if (p.fixed != nullptr) {
      std::copy_n(p.fixed, K, order.begin());
    } else if (!is_first) {
      std::partial_sort(order.begin(), order.begin() + K, order.end(), [&](int i, int j) {
        return scores[i] != scores[j] ? scores[i] > scores[j] : i < j;
      });
    }
    std::copy_n(g.frontier_bits + frontier, K, parent_bits.begin());
    for (int k = 0; k < K; ++k) {
      const int best = order[k];
      const int number = (p.level - 1) * K + k;
      const int64_t own_bit = number < 64 ? static_cast<int64_t>(uint64_t{1} << number) : 0;
      const int64_t at = frontier + k;
      g.frontier_scores[at] = scores[best];
      g.frontier_index[at] = offered + best;
      g.frontier_bits[at] = own_bit | (is_first ? 0 : parent_bits[best / K]);
      g.frontier_row[at] = is_first ? b : frontier + best / K;
      const int64_t token = p.tokens[children + best];
      if (p.ids_are_int64) {
        static_cast<int64_t*>(p.input_ids)[at] = token;
      } else {
        static_cast<int32_t*>(p.input_ids)[at] = static_cast<int32_t>(token);
      }
      p.positions[at] = std::min(p.root_positions[b] + p.level - 1, p.max_position);
    }
  }
}

}  // namespace vllm_eagle3

REGISTER_OP(expand_tree)
