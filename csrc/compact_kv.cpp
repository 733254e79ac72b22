#include <cstring>

#include "tensors.h"

namespace vllm_eagle3 {
namespace {

void compact_kv_cpu(const CompactKVParams& p) {
  for (int layer = 0; layer < p.num_layers; ++layer) {
    const CacheLayout& layout = p.layouts[layer];
    const size_t entry_bytes = static_cast<size_t>(p.num_words[layer]) * p.word_bytes;
    for (int b = 0; b < p.batch.num_reqs; ++b) {
      const RequestRows rows(p.batch, b);
      const int64_t slot = valid_slot(p.batch.idx_mapping[b], p.paths.num_slots);
      if (slot < 0) continue;
      const int64_t* slots = p.slot_mappings + layout.group * p.slot_mappings_stride + rows.root;
      const int num_places = p.paths.places(slot, rows.length);
      // In place, and so strictly in this order: path[i] >= i.
      for (int place = 1; place < num_places; ++place) {
        const int node = p.paths.node(slot, place, rows.length);
        if (node == place || slots[node] < 0 || slots[place] < 0) continue;
        const int64_t source = layout.words_to(slots[node]);
        const int64_t target = layout.words_to(slots[place]);
        for (int head = 0; head < p.num_heads[layer]; ++head) {
          char* first = reinterpret_cast<char*>(layout.address) +
                        head * layout.head_stride * p.word_bytes;
          std::memmove(first + target * p.word_bytes, first + source * p.word_bytes, entry_bytes);
        }
      }
    }
  }
}

void compact_kv(const Tensor& layout, const Tensor& num_words, const Tensor& num_heads,
                int64_t max_heads, int64_t word_bytes, int64_t vector_bytes,
                const Tensor& slot_mappings, const Tensor& path, const Tensor& path_len,
                const Tensor& idx_mapping, const Tensor& query_start_loc,
                const Tensor& cu_num_logits) {
  const Call call("compact_kv", layout);
  const int64_t num_layers = num_words.numel();
  STD_TORCH_CHECK(slot_mappings.scalar_type() == ScalarType::Long && slot_mappings.dim() == 2 &&
                      slot_mappings.stride(1) == 1,
                  "compact_kv: slot_mappings must be an int64 matrix with contiguous rows");
  const CompactKVParams params{
      reinterpret_cast<const CacheLayout*>(
          call.data<const int64_t>(layout, "layout", num_layers * 6)),
      call.data<const int32_t>(num_words, "num_words", num_layers),
      call.data<const int32_t>(num_heads, "num_heads", num_layers),
      static_cast<const int64_t*>(call.strided(slot_mappings, "slot_mappings", 0)),
      slot_mappings.stride(0),
      call.paths(path, path_len),
      call.batch_rows(idx_mapping, query_start_loc, cu_num_logits),
      static_cast<int>(num_layers),
      static_cast<int>(max_heads),
      static_cast<int>(word_bytes),
      static_cast<int>(vector_bytes),
  };
  call.run(params, launch_compact_kv, compact_kv_cpu);
}

}  // namespace
}  // namespace vllm_eagle3

REGISTER_OP(compact_kv)
