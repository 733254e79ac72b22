// What several operations share: batches, their rows, and accepted paths.

#pragma once

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
  void* data;
  bool is_int64;

  HOST_DEVICE int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
  HOST_DEVICE void set(int64_t i, int64_t value) const {
    if (is_int64) {
      static_cast<int64_t*>(data)[i] = value;
    } else {
      static_cast<int32_t*>(data)[i] = static_cast<int32_t>(value);
    }
  }
};

// A slot of the engine, or -1.
HOST_DEVICE int64_t valid_slot(int64_t slot, int num_slots) {
  return slot >= 0 && slot < num_slots ? slot : -1;
}

// Where the rows of a batch are. The last rows of a request are its tree.
struct BatchRows {
  Integers idx_mapping;            // [num_reqs] slot of each request
  const int32_t* query_start_loc;  // [num_reqs + 1] first row of each request, and the end
  const int32_t* cu_num_logits;    // [num_reqs + 1] rows of logits, cumulative
  int num_reqs;
};

// The rows of one request: a prefill's from `start`, its tree's from `root`, up to `end`.
struct RequestRows {
  int start, root, end;
  int length;  // of the tree

  HOST_DEVICE RequestRows(const BatchRows& batch, int b)
      : start(batch.query_start_loc[b]),
        end(batch.query_start_loc[b + 1]),
        length(batch.cu_num_logits[b + 1] - batch.cu_num_logits[b]) {
    root = end - length;
  }
};

// The accepted path of every slot.
struct Paths {
  const int32_t* path;      // [num_slots, num_nodes]
  const int32_t* path_len;  // [num_slots]
  int num_slots;
  int num_nodes;

  // Places of a slot's path that may be read, for a request of `length` rows: a path that is
  // not of this step must not lead out of its request.
  HOST_DEVICE int places(int64_t slot, int length) const {
    const int most = length < num_nodes ? length : num_nodes;
    return path_len[slot] < most ? path_len[slot] : most;
  }

  // The node at a place, or the place itself where the path leads out of the request.
  HOST_DEVICE int node(int64_t slot, int place, int length) const {
    const int node = path[slot * num_nodes + place];
    return node >= 0 && node < length ? node : place;
  }
};

}  // namespace vllm_eagle3
