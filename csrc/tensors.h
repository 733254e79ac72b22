// From torch's tensors to the plain pointers of ops.h, on the stable ABI.
//
// The Python entrances check arguments and name them in their errors. The checks here are for
// whoever calls torch.ops.vllm_eagle3 directly: types, devices, layouts and sizes. What the
// tensors hold (slots, row numbers, addresses) is trusted.

#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "ops.h"

namespace vllm_eagle3 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
constexpr ScalarType kTypeOf = torch::headeronly::CppTypeToScalarType<std::remove_const_t<T>>::value;

// The tensors of one call: all contiguous and on the device of the first.
class Call {
 public:
  Call(const char* op, const Tensor& first)
      : op_(op), is_cuda_(first.is_cuda()), device_(first.get_device_index()) {}

  // The data of a tensor of type T with `num_elements` or more.
  template <typename T>
  T* data(const Tensor& tensor, const char* name, int64_t num_elements) const {
    STD_TORCH_CHECK(tensor.scalar_type() == kTypeOf<T>, op_, ": wrong dtype of ", name);
    return static_cast<T*>(raw(tensor, name, num_elements));
  }

  Integers integers(const Tensor& tensor, const char* name, int64_t num_elements) const {
    const bool is_int64 = tensor.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(is_int64 || tensor.scalar_type() == ScalarType::Int, op_, ": wrong dtype of ",
                    name);
    return {raw(tensor, name, num_elements), is_int64};
  }

  FloatType float_type(const Tensor& tensor, const char* name) const {
    switch (tensor.scalar_type()) {
      case ScalarType::Float: return FloatType::kFloat;
      case ScalarType::Half: return FloatType::kHalf;
      case ScalarType::BFloat16: return FloatType::kBFloat16;
      default:
        STD_TORCH_CHECK(false, op_, ": ", name, " must be float32, float16 or bfloat16");
    }
  }

  BatchRows batch_rows(const Tensor& idx_mapping, const Tensor& query_start_loc,
                       const Tensor& cu_num_logits) const {
    const int64_t num_reqs = idx_mapping.numel();
    return {
        integers(idx_mapping, "idx_mapping", num_reqs),
        data<const int32_t>(query_start_loc, "query_start_loc", num_reqs + 1),
        data<const int32_t>(cu_num_logits, "cu_num_logits", num_reqs + 1),
        static_cast<int>(num_reqs),
    };
  }

  Paths paths(const Tensor& path, const Tensor& path_len) const {
    const int64_t num_slots = path.size(0);
    const int64_t num_nodes = path.size(1);
    STD_TORCH_CHECK(num_nodes <= kMaxNodes, op_, ": a tree has at most ", kMaxNodes, " nodes");
    return {
        data<const int32_t>(path, "path", num_slots * num_nodes),
        data<const int32_t>(path_len, "path_len", num_slots),
        static_cast<int>(num_slots),
        static_cast<int>(num_nodes),
    };
  }

  void* raw(const Tensor& tensor, const char* name, int64_t num_elements) const {
    STD_TORCH_CHECK(tensor.is_contiguous(), op_, ": ", name, " must be contiguous");
    return strided(tensor, name, num_elements);
  }

  void* strided(const Tensor& tensor, const char* name, int64_t num_elements) const {
    STD_TORCH_CHECK(tensor.is_cuda() == is_cuda_ && tensor.get_device_index() == device_, op_, ": ",
                    name, " is on another device");
    STD_TORCH_CHECK(tensor.numel() >= num_elements, op_, ": ", name, " has ", tensor.numel(),
                    " elements, needs ", num_elements);
    return tensor.data_ptr();
  }

  // Runs the CUDA launcher on torch's current stream, or the CPU kernel.
  template <typename Params>
  void run(const Params& params, cudaError_t (*cuda)(const Params&, cudaStream_t),
           void (*cpu)(const Params&)) const {
    if (!is_cuda_) return cpu(params);
    torch::stable::accelerator::DeviceGuard guard(device_);
    const cudaError_t error = cuda(params, current_stream());
    STD_TORCH_CHECK(error == cudaSuccess, op_, ": ", cudaGetErrorString(error));
  }

 private:
  // libtorch_cuda is looked up among the loaded libraries, not linked: a torch without CUDA must
  // be able to load this one and run its CPU kernels.
  cudaStream_t current_stream() const {
    using Getter = AOTITorchError (*)(int32_t, void**);
    static const Getter getter = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
      return reinterpret_cast<Getter>(symbol);
    }();
    STD_TORCH_CHECK(getter != nullptr, op_, ": this torch has no CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(getter(device_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

  const char* op_;
  bool is_cuda_;
  int32_t device_;
};

}  // namespace vllm_eagle3

// One function serves both devices: Call::run chooses the kernel.
#define REGISTER_OP(name)                                       \
  STABLE_TORCH_LIBRARY_IMPL(vllm_eagle3, CPU, library) {        \
    library.impl(#name, TORCH_BOX(&vllm_eagle3::name));         \
  }                                                             \
  STABLE_TORCH_LIBRARY_IMPL(vllm_eagle3, CUDA, library) {       \
    library.impl(#name, TORCH_BOX(&vllm_eagle3::name));         \
  }
