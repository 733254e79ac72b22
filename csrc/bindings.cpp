// The schemas of torch.ops.vllm_eagle3. Each operation's .cpp file registers its kernels.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(vllm_eagle3, library) {
  library.def(
      "verify_tree(Tensor target_tokens_L, Tensor draft_tokens_L, Tensor parents_RN, "
      "Tensor idx_mapping_B, Tensor cu_num_logits_B1, Tensor(a!) path_RN, "
      "Tensor(b!) path_len_R, Tensor(c!) tokens_BN, Tensor(d!) num_sampled_B) -> ()");
}
