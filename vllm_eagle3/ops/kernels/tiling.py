"""Tile sizes, grid and scales that the kernels of tree attention share."""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_eagle3.ops.dispatch import interpreted

_LOG2_E = 1.0 / math.log(2.0)
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def tile_sizes(
    query_THD: torch.Tensor, tree_key_SHD: torch.Tensor, max_query_len: int, max_tree_len: int
) -> dict[str, Any]:
    """The constants that both kernels share."""
    head_dim = query_THD.shape[2]
    group = query_THD.shape[1] // tree_key_SHD.shape[1]
    dot = query_THD.dtype
    wide = dot == torch.float32
    if interpreted() and dot == torch.bfloat16:
        dot = torch.float32  # the interpreter multiplies bfloat16 as the integers it keeps
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": _clamp(max_query_len * group, 64 if head_dim <= 128 and not wide else 32),
        "BLOCK_S": _clamp(max_tree_len, keys_per_step(query_THD)),
        "DOT": _TYPES[dot],
        # float32 means float32: TF32 would cost the identity with plain decoding.
        "PRECISION": "ieee",
        "num_warps": 8 if wide else 4,
        # Two stages fit into the shared memory of every GPU since Ampere.
        "num_stages": 2,
    }


def keys_per_step(query_THD: torch.Tensor) -> int:
    """Keys of one step: as many as leave room for two stages in shared memory."""
    block = 64 if query_THD.shape[2] <= 128 else 32
    return block // 2 if query_THD.dtype == torch.float32 else block


def _clamp(size: int, largest: int) -> int:
    """The next power of 2, at least the 16 that a matrix product needs."""
    return min(max(16, triton.next_power_of_2(size)), largest)


def score_scales(scale: float, softcap: float) -> tuple[float, float]:
    """Factors inside and outside of the soft cap; scores come out in base 2."""
    if softcap > 0.0:
        return scale / softcap, softcap * _LOG2_E
    return 0.0, scale * _LOG2_E


def tile_grid(
    query_start_loc_B1: torch.Tensor,
    tree_key_SHD: torch.Tensor,
    max_query_len: int,
    sizes: dict[str, Any],
) -> tuple[int, int, int]:
    tiles = triton.cdiv(max_query_len * sizes["GROUP"], sizes["BLOCK_M"])
    return tiles, tree_key_SHD.shape[1], query_start_loc_B1.shape[0] - 1
