"""Tile sizes, grids, splits and scales that the kernels of tree attention share."""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from vllm_eagle3.ops.device import num_sms, shared_memory
from vllm_eagle3.ops.dispatch import interpreted

_LOG2_E = 1.0 / math.log(2.0)
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# A split of fewer keys costs more in partial results than it saves in waiting.
_LEAST_KEYS = 128
# More keys of a long prefix in one program would keep the launch waiting for it.
_MOST_KEYS = 4096
_MAX_SPLITS = 128
_MAX_SCRATCH_BYTES = 64 << 20


class Splits(NamedTuple):
    """How the prefixes are split; by what the host knows, since CUDA graphs keep it.

    Attributes:
        num_splits: programs along a prefix; those past its end leave at once.
        few_splits: splits that keep the device busy.
        least_keys, most_keys: bounds on the keys of a split.
    """

    num_splits: int
    few_splits: int
    least_keys: int
    most_keys: int


def tile_sizes(
    out_THD: torch.Tensor, tree_key_SHD: torch.Tensor, max_query_len: int, max_tree_len: int
) -> dict[str, Any]:
    """The constants of a kernel that walks over a prefix."""
    head_dim = out_THD.shape[2]
    group = out_THD.shape[1] // tree_key_SHD.shape[1]
    wide = out_THD.dtype == torch.float32
    packed = max_query_len * group
    tallest = 64 if head_dim <= 128 and not wide else 32
    # Two tiles of 64 rows become one where that pads no further: keys are read once.
    tall = tallest == 64 and (packed % 128 == 0 or packed % 128 > 64)
    return {
        **_constants(out_THD, tree_key_SHD),
        "BLOCK_M": 128 if tall else _clamp(packed, tallest),
        # Two sizes at most: each compiles anew, and the levels of a draft are all sizes.
        "BLOCK_S": _clamp(max(max_tree_len, 32), keys_per_step(out_THD)),
        "num_warps": 8 if wide or tall else 4,
        "num_stages": 3 if _deep_pipeline(out_THD) else 2,
    }


def finish_sizes(
    out_THD: torch.Tensor,
    tree_key_SHD: torch.Tensor,
    max_query_len: int,
    max_tree_len: int,
    batch: int,
) -> dict[str, Any]:
    """The constants of the kernel that only meets the tree: tiles small enough for all SMs."""
    sizes = tile_sizes(out_THD, tree_key_SHD, max_query_len, max_tree_len)
    packed = max_query_len * sizes["GROUP"]
    block = min(sizes["BLOCK_M"], 64)
    programs = batch * tree_key_SHD.shape[1]
    while block > 16 and triton.cdiv(packed, block) * programs < num_sms(out_THD.device):
        block //= 2
    warps = 8 if out_THD.dtype == torch.float32 else 4
    return sizes | {"BLOCK_M": block, "num_warps": warps, "num_stages": 1}


def _constants(out_THD: torch.Tensor, tree_key_SHD: torch.Tensor) -> dict[str, Any]:
    head_dim, dtype = out_THD.shape[2], out_THD.dtype
    # The interpreter multiplies bfloat16 as the integers it keeps.
    wide = interpreted() and dtype == torch.bfloat16
    return {
        "GROUP": out_THD.shape[1] // tree_key_SHD.shape[1],
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "TYPE": _TYPES[dtype],
        "DOT": tl.float32 if wide else _TYPES[dtype],
        # float32 means float32: TF32 would cost the identity with plain decoding.
        "PRECISION": "ieee",
    }


def keys_per_step(out_THD: torch.Tensor) -> int:
    """Keys of one step: as many as leave room for two stages in shared memory."""
    block = 64 if out_THD.shape[2] <= 128 else 32
    return block // 2 if out_THD.dtype == torch.float32 else block


def _clamp(size: int, largest: int) -> int:
    """The next power of 2, at least the 16 that a matrix product needs."""
    return min(max(16, triton.next_power_of_2(size)), largest)


def split_prefixes(
    out_THD: torch.Tensor,
    sizes: dict[str, Any],
    max_query_len: int,
    batch: int,
    num_kv_heads: int,
    max_prefix_len: int,
    num_splits: int | None,
) -> Splits:
    """The splits of one launch; ``num_splits`` forces a number, however short the prefixes."""
    if num_splits is not None:
        return Splits(num_splits, num_splits, keys_per_step(out_THD), 1 << 30)
    tiles = triton.cdiv(max_query_len * sizes["GROUP"], sizes["BLOCK_M"])
    # A tile of 128 rows leaves no room for a second one on its SM.
    slots = num_sms(out_THD.device) * (1 if sizes["BLOCK_M"] > 64 else 2)
    busy = max(1, slots // (tiles * num_kv_heads * batch))
    split_bytes = 4 * out_THD.numel()
    most = max(busy, _MAX_SCRATCH_BYTES // split_bytes)
    wanted = max(busy, triton.cdiv(max_prefix_len, _MOST_KEYS))
    useful = triton.cdiv(max(max_prefix_len, 1), _LEAST_KEYS)
    return Splits(min(wanted, most, useful, _MAX_SPLITS), busy, _LEAST_KEYS, _MOST_KEYS)


def _deep_pipeline(out_THD: torch.Tensor) -> bool:
    """Whether three stages of keys and values and a tile of 128 rows fit beside each other.

    Two fit into every GPU since Ampere; with three, the next keys travel while a step computes.
    """
    padded = triton.next_power_of_2(out_THD.shape[2])
    row_bytes = padded * out_THD.element_size()
    needed = (128 + 3 * 2 * keys_per_step(out_THD)) * row_bytes + 4096
    return needed <= shared_memory(out_THD.device)


def score_scales(scale: float, softcap: float) -> tuple[float, float]:
    """Factors inside and outside of the soft cap; scores come out in base 2."""
    if softcap > 0.0:
        return scale / softcap, softcap * _LOG2_E
    return 0.0, scale * _LOG2_E
