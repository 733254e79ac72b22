#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "drafting.h"

namespace vllm_eagle3 {
namespace {

template <typename T>
void draft_topk_cpu_of(const DraftTopkParams& p) {
  std::vector<float> logits(p.vocab);
  std::vector<int> ids(p.vocab);
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (int row = 0; row < p.num_rows; ++row) {
    const T* source = static_cast<const T*>(p.logits) + row * p.row_stride;
    bool has_nan = false;
    for (int id = 0; id < p.vocab; ++id) {
      logits[id] = static_cast<float>(source[id]);
      if (std::isnan(logits[id])) {
        has_nan = true;
        logits[id] = -kInf;
      }
    }
    std::iota(ids.begin(), ids.end(), 0);
    std::partial_sort(ids.begin(), ids.begin() + p.k, ids.end(), [&](int i, int j) {
      return logits[i] != logits[j] ? logits[i] > logits[j] : i < j;
    });
    const float max = logits[ids[0]];
    double sum = has_nan ? std::numeric_limits<double>::quiet_NaN() : 0.0;
    for (float logit : logits) sum += std::exp(logit - max);
    for (int i = 0; i < p.k; ++i) {
      const int64_t at = int64_t{row} * p.k + i;
      p.log_probs[at] = (logits[ids[i]] - max) - static_cast<float>(std::log(sum));
      p.tokens[at] = p.offsets == nullptr ? ids[i] : ids[i] + p.offsets[ids[i]];
    }
  }
}

void draft_topk(const Tensor& logits, const std::optional<Tensor>& offsets,
                const Tensor& partial_best, const Tensor& partial_sums, const Tensor& log_probs,
                const Tensor& tokens) {
  const Call call("draft_topk", logits);
  DraftTopkParams params =
      draft_topk_params(call, logits, offsets, partial_best, partial_sums);
  const int64_t num_children = int64_t{params.num_rows} * params.k;
  params.log_probs = call.data<float>(log_probs, "log_probs", num_children);
  params.tokens = call.data<int64_t>(tokens, "tokens", num_children);
  call.run(params, launch_draft_topk, draft_topk_cpu);
}

}  // namespace

DraftTopkParams draft_topk_params(const Call& call, const Tensor& logits,
                                  const std::optional<Tensor>& offsets, const Tensor& partial_best,
                                  const Tensor& partial_sums) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.stride(1) == 1 && partial_best.dim() == 3,
                  "draft_topk: logits must be a matrix with contiguous rows, and partial_best "
                  "[rows, splits, k]");
  const int64_t num_rows = logits.size(0);
  const int64_t vocab = logits.size(1);
  const int64_t num_splits = partial_best.size(1);
  const int64_t k = partial_best.size(2);
  STD_TORCH_CHECK(1 <= k && k <= vocab && k <= kMaxChildren && 1 <= num_splits &&
                      vocab <= std::numeric_limits<int>::max() / 2,
                  "draft_topk: k must be between 1 and 16, and at most the vocabulary");
  return {
      call.strided(logits, "logits", num_rows * vocab),
      call.float_type(logits, "logits"),
      logits.stride(0),
      offsets ? call.data<const int64_t>(*offsets, "offsets", vocab) : nullptr,
      call.data<int64_t>(partial_best, "partial_best", num_rows * num_splits * k),
      call.data<float>(partial_sums, "partial_sums", num_rows * num_splits * 2),
      nullptr,
      nullptr,
      static_cast<int>(num_rows),
      static_cast<int>(vocab),
      static_cast<int>(k),
      static_cast<int>(num_splits),
  };
}

void draft_topk_cpu(const DraftTopkParams& p) {
  switch (p.type) {
    case FloatType::kFloat: return draft_topk_cpu_of<float>(p);
    case FloatType::kHalf: return draft_topk_cpu_of<torch::headeronly::Half>(p);
    case FloatType::kBFloat16: return draft_topk_cpu_of<torch::headeronly::BFloat16>(p);
  }
}

}  // namespace vllm_eagle3

REGISTER_OP(draft_topk)
