#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <vector>

#include "tensors.h"

namespace vllm_eagle3 {
namespace {

template <typename T>
float inverse_rms(const FuseFeaturesParams& p, int64_t row, int first, int last) {
  double sum = 0.0;  // one after the other, float32 would lose digits
  for (int s = first; s < last; ++s) {
    const T* x = static_cast<const T*>(p.states[s]) + row * p.state_strides[s];
    for (int i = 0; i < p.hidden_size; ++i) {
      const double value = static_cast<float>(x[i]);
      sum += value * value;
    }
  }
  return static_cast<float>(1.0 / std::sqrt(sum / ((last - first) * p.hidden_size) + p.eps));
}

template <typename T>
void fuse_rows(const FuseFeaturesParams& p) {
  for (int row = 0; row < p.num_rows; ++row) {
    const int64_t taken = p.index.data == nullptr ? row : p.index[row];
    T* out = static_cast<T*>(p.out) + row * p.out_stride;
    float scale = p.joint_norm ? inverse_rms<T>(p, taken, 0, p.num_states) : 1.0f;
    for (int s = 0; s < p.num_states; ++s, out += p.hidden_size) {
      const T* x = static_cast<const T*>(p.states[s]) + taken * p.state_strides[s];
      const T* weight = static_cast<const T*>(p.weights[s]);
      if (weight != nullptr && !p.joint_norm) scale = inverse_rms<T>(p, taken, s, s + 1);
      for (int i = 0; i < p.hidden_size; ++i) {
        out[i] = weight == nullptr ? x[i] : normed(x[i], scale, weight[i]);
      }
    }
  }
}

void fuse_features_cpu(const FuseFeaturesParams& p) {
  switch (p.type) {
    case FloatType::kFloat: return fuse_rows<float>(p);
    case FloatType::kHalf: return fuse_rows<torch::headeronly::Half>(p);
    case FloatType::kBFloat16: return fuse_rows<torch::headeronly::BFloat16>(p);
  }
}

void fuse_features(const std::vector<Tensor>& states, const std::optional<Tensor>& index,
                   const std::vector<Tensor>& norm_weights, double eps, const Tensor& out) {
  const Call call("fuse_features", out);
  const auto num_states = static_cast<int>(states.size());
  STD_TORCH_CHECK(num_states >= 1 && num_states <= kMaxStates && out.dim() == 2,
                  "fuse_features: needs 1 to ", kMaxStates, " states and a matrix for them");
  const int64_t hidden_size = states[0].size(1);
  const int64_t num_rows = out.size(0);
  STD_TORCH_CHECK(out.size(1) == num_states * hidden_size && out.stride(1) == 1,
                  "fuse_features: out must have contiguous rows of all states");
  const auto num_weights = static_cast<int>(norm_weights.size());
  STD_TORCH_CHECK(num_weights <= 1 || num_weights == num_states,
                  "fuse_features: needs no norm weight, one, or one for each state");

  FuseFeaturesParams params{};
  params.type = call.float_type(out, "out");
  params.num_rows = static_cast<int>(num_rows);
  params.num_states = num_states;
  params.hidden_size = static_cast<int>(hidden_size);
  params.eps = static_cast<float>(eps);
  params.joint_norm = num_weights == 1;
  params.out = call.strided(out, "out", 0);
  params.out_stride = out.stride(0);
  if (index) params.index = call.integers(*index, "index", num_rows);
  for (int s = 0; s < num_states; ++s) {
    const Tensor& state = states[s];
    STD_TORCH_CHECK(state.scalar_type() == out.scalar_type() && state.dim() == 2 &&
                        state.size(1) == hidden_size && state.stride(1) == 1 &&
                        (index || state.size(0) >= num_rows),
                    "fuse_features: state ", s, " has another type or shape");
    params.states[s] = call.strided(state, "state", 0);
    params.state_strides[s] = state.stride(0);
  }
  for (int s = 0; num_weights > 0 && s < num_states; ++s) {
    const Tensor& weight = norm_weights[num_weights == 1 ? 0 : s];
    STD_TORCH_CHECK(weight.scalar_type() == out.scalar_type(),
                    "fuse_features: norm weights must have the type of the states");
    const int64_t first = num_weights == 1 ? s * hidden_size : 0;
    const auto* data = call.raw(weight, "norm weight", first + hidden_size);
    params.weights[s] = static_cast<const char*>(data) + first * weight.element_size();
  }
  call.run(params, launch_fuse_features, fuse_features_cpu);
}

}  // namespace
}  // namespace vllm_eagle3

REGISTER_OP(fuse_features)
