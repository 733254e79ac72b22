// The schemas of torch.ops.vllm_eagle3. Each operation's .cpp file registers its kernels.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(vllm_eagle3, library) {
  library.def(
      "accepted_row_index(Tensor path_RN, Tensor path_len_R, Tensor idx_mapping_B, "
      "Tensor query_start_loc_B1, Tensor cu_num_logits_B1, Tensor(a!) index_T, "
      "Tensor(b!)? token_ids_T) -> ()");
  library.def(
      "build_tree(Tensor pool_tokens_BC, Tensor pool_scores_BC, Tensor pool_parents_BC, "
      "Tensor? kept_M, int num_offered, int level, int num_reqs, Tensor slots_B, "
      "Tensor chain_only_R, Tensor(a!) tokens_RN, Tensor(b!) parents_RN, Tensor(c!) depths_RN, "
      "Tensor(d!) ancestor_bits_RN, Tensor(e!) scores_RN, Tensor(f!) draft_tokens_BM) -> ()");
  // The layout holds the addresses of the caches, and stands for what is written there.
  library.def(
      "compact_kv(Tensor(a!) layout_L6, Tensor num_words_L, Tensor num_heads_L, int max_heads, "
      "int word_bytes, int vector_bytes, Tensor slot_mappings_GT, Tensor path_RN, "
      "Tensor path_len_R, Tensor idx_mapping_B, Tensor query_start_loc_B1, "
      "Tensor cu_num_logits_B1) -> ()");
  library.def(
      "draft_topk(Tensor logits_MV, Tensor? offsets_V, Tensor(a!) partial_best_MSK, "
      "Tensor(b!) partial_sums_MS2, Tensor(c!) log_probs_MK, Tensor(d!) tokens_MK) -> ()");
  library.def(
      "expand_logits(Tensor(a!) tokens_BC, Tensor(b!) scores_BC, Tensor(c!) parents_BC, "
      "Tensor(d!) frontier_scores_BK, Tensor(e!) frontier_index_BK, "
      "Tensor(f!) frontier_bits_BK, Tensor(g!) frontier_row_BK, Tensor? fixed_K, "
      "Tensor logits_MV, Tensor? offsets_V, Tensor(h!) partial_best_MSK, "
      "Tensor(i!) partial_sums_MS2, int level, int num_reqs, Tensor root_positions_B, "
      "int max_position, Tensor(j!) input_ids_M, Tensor(k!) positions_M) -> ()");
  library.def(
      "expand_tree(Tensor(a!) tokens_BC, Tensor(b!) scores_BC, Tensor(c!) parents_BC, "
      "Tensor(d!) frontier_scores_BK, Tensor(e!) frontier_index_BK, "
      "Tensor(f!) frontier_bits_BK, Tensor(g!) frontier_row_BK, Tensor? fixed_K, "
      "Tensor log_probs_MK, Tensor tokens_MK, int level, int num_reqs, Tensor root_positions_B, "
      "int max_position, Tensor(h!) input_ids_M, Tensor(i!) positions_M) -> ()");
  library.def(
      "fuse_features(Tensor[] states, Tensor? index_T, Tensor[] norm_weights, float eps, "
      "Tensor(a!) out_TF) -> ()");
  library.def(
      "gather_tree_rows(Tensor ancestor_bits_RN, Tensor depths_RN, Tensor idx_mapping_B, "
      "Tensor query_start_loc_B1, Tensor cu_num_logits_B1, Tensor linear_positions_T, "
      "Tensor(a!) out_bits_T, Tensor(b!) out_positions_T, Tensor(c!) out_prefix_lens_B, "
      "Tensor seq_lens_B) -> ()");
  library.def(
      "verify_tree(Tensor target_tokens_L, Tensor draft_tokens_L, Tensor parents_RN, "
      "Tensor idx_mapping_B, Tensor cu_num_logits_B1, Tensor(a!) path_RN, "
      "Tensor(b!) path_len_R, Tensor(c!) tokens_BN, Tensor(d!) num_sampled_B) -> ()");
}
