// What each operation's CPU kernel and CUDA kernel take, and the CUDA launchers.
//
// Nothing of torch in here: the .cu files compile without its headers. Dimensions are named as
// in vllm_eagle3/tree/types.py. The launchers return the error of the launch and never wait.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace vllm_eagle3 {

constexpr int kMaxNodes = 64;  // ancestor bits are one word
constexpr int kNoParent = -1;

// int32 or int64 values: vLLM keeps its request slots and token ids in either.
struct Integers {
  const void* data;
  bool is_int64;

  HOST_DEVICE int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// A slot of the engine, or -1.
HOST_DEVICE int64_t valid_slot(int64_t slot, int num_slots) {
  return slot >= 0 && slot < num_slots ? slot : -1;
}

struct VerifyTreeParams {
  const int64_t* target_tokens;  // [num_logits]
  Integers draft_tokens;         // [num_logits]
  const int32_t* parents;        // [num_slots, num_nodes]
  Integers idx_mapping;          // [num_reqs]
  const int32_t* cu_num_logits;  // [num_reqs + 1]
  int32_t* path;                 // [num_slots, num_nodes]
  int32_t* path_len;             // [num_slots]
  int64_t* tokens;               // [num_reqs, num_columns]
  int32_t* num_sampled;          // [num_reqs]
  int num_reqs;
  int num_slots;
  int num_nodes;
  int num_columns;
};
cudaError_t launch_verify_tree(const VerifyTreeParams& params, cudaStream_t stream);

}  // namespace vllm_eagle3
