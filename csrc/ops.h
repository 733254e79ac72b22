// What each operation's CPU kernel and CUDA kernel take, and the CUDA launchers.
//
// Nothing of torch in here: the .cu files compile without its headers. Dimensions are named as
// in vllm_eagle3/tree/types.py. The launchers return the error of the launch and never wait.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "batch.h"

namespace vllm_eagle3 {

struct AcceptedRowIndexParams {
  Paths paths;
  BatchRows batch;
  int64_t* index;      // [num_tokens]
  Integers token_ids;  // [rows of the requests] permuted in place; none if its data is null
  int num_tokens;
};
cudaError_t launch_accepted_row_index(const AcceptedRowIndexParams& params, cudaStream_t stream);

// One layer's cache, in words of `word_bytes`.
struct CacheLayout {
  int64_t address;
  int64_t block_stride;
  int64_t head_stride;
  int64_t token_stride;
  int64_t block_size;
  int64_t group;

  // Of a cache slot, from the first token of a head.
  HOST_DEVICE int64_t words_to(int64_t cache_slot) const {
    return cache_slot / block_size * block_stride + cache_slot % block_size * token_stride;
  }
};

struct CompactKVParams {
  const CacheLayout* layouts;    // [num_layers]
  const int32_t* num_words;      // [num_layers] of one head's entry for one token
  const int32_t* num_heads;      // [num_layers]
  const int64_t* slot_mappings;  // [num_groups, slot_mappings_stride] cache slot of each row
  int64_t slot_mappings_stride;
  Paths paths;
  BatchRows batch;
  int num_layers;
  int max_heads;
  int word_bytes;
  int vector_bytes;  // bytes of one copy: 1, 2, 4, 8 or 16, at which everything is aligned
};
cudaError_t launch_compact_kv(const CompactKVParams& params, cudaStream_t stream);

enum class FloatType { kFloat, kHalf, kBFloat16 };

constexpr int kMaxStates = 8;

struct FuseFeaturesParams {
  const void* states[kMaxStates];     // [num_states] of [rows of the forward, hidden_size]
  int64_t state_strides[kMaxStates];  // elements from row to row
  const void* weights[kMaxStates];    // [num_states] of [hidden_size], null without a norm
  Integers index;                     // [num_rows] row to take; its own if the data is null
  void* out;                          // [num_rows, num_states * hidden_size]
  int64_t out_stride;                 // elements from row to row
  float eps;
  FloatType type;
  int num_rows;
  int num_states;
  int hidden_size;
  bool joint_norm;  // one norm over the concatenation, else one for each state
};

// As vLLM's RMSNorm rounds: to the type of the states before the weight, and after it.
template <typename T>
HOST_DEVICE T normed(T x, float scale, T weight) {
  const T rounded = static_cast<T>(static_cast<float>(x) * scale);
  return static_cast<T>(static_cast<float>(rounded) * static_cast<float>(weight));
}
cudaError_t launch_fuse_features(const FuseFeaturesParams& params, cudaStream_t stream);

struct GatherTreeRowsParams {
  const int64_t* ancestor_bits;     // [num_slots, num_nodes]
  const int32_t* depths;            // [num_slots, num_nodes]
  BatchRows batch;
  const int64_t* linear_positions;  // [num_tokens]
  int64_t* out_bits;                // [num_tokens]
  int64_t* out_positions;           // [num_tokens]
  int32_t* out_prefix_lens;         // [num_prefix_lens]
  const int32_t* seq_lens;          // [num_reqs]
  int num_slots;
  int num_nodes;
  int num_prefix_lens;
};

// The nodes of one request: of its slot, or a chain.
struct TreeRows {
  const int64_t* stored_bits;
  const int32_t* stored_depths;
  int length;

  HOST_DEVICE TreeRows(const GatherTreeRowsParams& p, int b, int num_rows)
      : stored_bits(nullptr),
        stored_depths(nullptr),
        length(num_rows < p.num_nodes ? num_rows : p.num_nodes) {
    const int64_t slot = valid_slot(p.batch.idx_mapping[b], p.num_slots);
    if (slot < 0 || num_rows <= 1) return;
    stored_bits = p.ancestor_bits + slot * p.num_nodes;
    stored_depths = p.depths + slot * p.num_nodes;
  }

  HOST_DEVICE int64_t bits(int node) const {
    if (stored_bits != nullptr) return stored_bits[node];
    return static_cast<int64_t>(~uint64_t{0} >> (kMaxNodes - 1 - node));
  }

  HOST_DEVICE int depth(int node) const {
    return stored_depths != nullptr ? stored_depths[node] : node;
  }
};
cudaError_t launch_gather_tree_rows(const GatherTreeRowsParams& params, cudaStream_t stream);

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

constexpr int kMaxChildren = 16;  // that the CUDA kernel of draft_topk keeps in a warp

struct DraftTopkParams {
  const void* logits;  // [num_rows, vocab], rows `row_stride` apart
  FloatType type;
  int64_t row_stride;
  const int64_t* offsets;   // [vocab], or null
  int64_t* partial_best;    // [num_rows, num_splits, k]: scratch, key and id
  float* partial_sums;      // [num_rows, num_splits, 2]: scratch
  float* log_probs;         // [num_rows, k]; null to stop at the splits
  int64_t* tokens;          // [num_rows, k]
  int num_rows;
  int vocab;
  int k;
  int num_splits;
};
cudaError_t launch_draft_topk(const DraftTopkParams& params, cudaStream_t stream);
cudaError_t launch_draft_splits(const DraftTopkParams& params, cudaStream_t stream);

// The tensors of vllm_eagle3.tree.types.GrowthBuffers.
struct Growth {
  int64_t* tokens;           // [max_batch, num_candidates]
  float* scores;             // [max_batch, num_candidates]
  int32_t* parents;          // [max_batch, num_candidates]
  float* frontier_scores;    // [max_batch, top_k]
  int32_t* frontier_index;   // [max_batch, top_k]
  int64_t* frontier_bits;    // [max_batch, top_k]
  int64_t* frontier_row;     // [max_batch, top_k]
  int num_candidates;
  int top_k;
};

// Candidates offered up to a level.
HOST_DEVICE int pool_size(int level, int top_k) { return top_k + (level - 1) * top_k * top_k; }

struct ExpandTreeParams {
  Growth growth;
  const float* log_probs;         // [num_reqs, top_k] at level 1, [num_reqs, top_k, top_k] below
  const int64_t* tokens;          // likewise
  const int64_t* fixed;           // [top_k] children that go on, in order; null for the best
  const int64_t* root_positions;  // [num_reqs]
  int64_t max_position;
  void* input_ids;  // [num_reqs, top_k] int32 or int64
  bool ids_are_int64;
  int64_t* positions;  // [num_reqs, top_k]
  int level;
  int num_reqs;
};
cudaError_t launch_expand_tree(const ExpandTreeParams& params, cudaStream_t stream);

struct ExpandLogitsParams {
  DraftTopkParams logits;  // of the rows whose children `tree` has no arrays of
  ExpandTreeParams tree;
};
cudaError_t launch_expand_logits(const ExpandLogitsParams& params, cudaStream_t stream);

struct BuildTreeParams {
  const int64_t* pool_tokens;   // [num_reqs, num_candidates]
  const float* pool_scores;     // [num_reqs, num_candidates]
  const int32_t* pool_parents;  // [num_reqs, num_candidates]
  const int64_t* kept;          // [num_kept] candidates of the tree, in order; null for the best
  Integers slots;               // [num_reqs]
  const bool* chain_only;       // [num_slots]
  int64_t* tokens;              // [num_slots, num_nodes], and so the next four
  int32_t* parents;
  int32_t* depths;
  int64_t* ancestor_bits;
  float* scores;
  int64_t* draft_tokens;  // [num_reqs, num_nodes - 1], rows `draft_stride` apart
  int64_t draft_stride;
  int num_candidates;
  int num_offered;
  int num_kept;  // less than num_nodes
  int level;
  int num_reqs;
  int num_slots;
  int num_nodes;
};
cudaError_t launch_build_tree(const BuildTreeParams& params, cudaStream_t stream);

}  // namespace vllm_eagle3
