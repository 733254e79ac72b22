// One block for each layer and request; its warps share out the heads.
//
// Moving in place is safe without a wait. Every lane moves its own words of all entries, so no
// lane reads what another writes. And path[j] >= j, so what place i overwrites is not read for
// any place after it: a lane may load several entries before it stores the first.

#include "ops.h"
#include "warp.h"

namespace vllm_eagle3 {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kInFlight = 4;  // entries that a lane has loaded and not yet stored

template <typename Vector>
__global__ void compact_kv_kernel(const CompactKVParams p) {
  const int layer = blockIdx.x;
  const int b = blockIdx.y;
  const int lane = threadIdx.x % kWarp;
  const int64_t slot = valid_slot(p.batch.idx_mapping[b], p.paths.num_slots);
  if (slot < 0) return;
  const RequestRows rows(p.batch, b);
  const int num_places = p.paths.places(slot, rows.length);

  // Lane i holds the moves to place i and to place i + 32; no move has a negative source.
  int64_t source[2], target[2];
  int node[2];
  bool moves = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int place = lane + half * kWarp;
    node[half] = place < num_places ? p.paths.node(slot, place, rows.length) : place;
    moves |= node[half] != place;
  }
  // Most accepted paths are contiguous already: the best child comes right after its parent.
  if (!__any_sync(kAll, moves)) return;

  const CacheLayout layout = p.layouts[layer];
  const int64_t* slots = p.slot_mappings + layout.group * p.slot_mappings_stride + rows.root;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int place = lane + half * kWarp;
    source[half] = target[half] = -1;
    if (node[half] == place) continue;
    const int64_t from = slots[node[half]];
    const int64_t to = slots[place];
    if (from < 0 || to < 0) continue;
    source[half] = layout.words_to(from) * p.word_bytes;
    target[half] = layout.words_to(to) * p.word_bytes;
  }

  const int num_vectors = p.num_words[layer] * p.word_bytes / static_cast<int>(sizeof(Vector));
  const int num_heads = p.num_heads[layer];
  for (int head = threadIdx.x / kWarp; head < num_heads; head += blockDim.x / kWarp) {
    char* first = reinterpret_cast<char*>(layout.address) + head * layout.head_stride * p.word_bytes;
    // All lanes stay in the loops: the moves are read from the lanes that hold them.
    for (int base = 0; base < num_vectors; base += kWarp) {
      const bool in_entry = base + lane < num_vectors;
      char* column = first + int64_t{base + lane} * static_cast<int>(sizeof(Vector));
      for (int place = 1; place < num_places; place += kInFlight) {
        Vector loaded[kInFlight];
        int64_t to[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          const int at = place + i;
          const int half = at / kWarp;
          const int64_t from = __shfl_sync(kAll, half == 0 ? source[0] : source[1], at % kWarp);
          to[i] = __shfl_sync(kAll, half == 0 ? target[0] : target[1], at % kWarp);
          if (at >= num_places || !in_entry) to[i] = -1;
          if (to[i] >= 0) loaded[i] = *reinterpret_cast<const Vector*>(column + from);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (to[i] >= 0) *reinterpret_cast<Vector*>(column + to[i]) = loaded[i];
        }
      }
    }
  }
}

template <typename Vector>
void launch(const CompactKVParams& params, cudaStream_t stream) {
  const int num_warps = params.max_heads < kMaxWarps ? params.max_heads : kMaxWarps;
  const dim3 grid(params.num_layers, params.batch.num_reqs);
  compact_kv_kernel<Vector><<<grid, num_warps * kWarp, 0, stream>>>(params);
}

}  // namespace

cudaError_t launch_compact_kv(const CompactKVParams& params, cudaStream_t stream) {
  if (params.num_layers == 0 || params.batch.num_reqs == 0) return cudaSuccess;
  switch (params.vector_bytes) {
    case 16: launch<uint4>(params, stream); break;
    case 8: launch<uint2>(params, stream); break;
    case 4: launch<uint32_t>(params, stream); break;
    case 2: launch<uint16_t>(params, stream); break;
    case 1: launch<uint8_t>(params, stream); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace vllm_eagle3
