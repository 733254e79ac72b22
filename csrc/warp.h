// What a warp is to every kernel.

#pragma once

namespace vllm_eagle3 {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;  // lanes

}  // namespace vllm_eagle3
