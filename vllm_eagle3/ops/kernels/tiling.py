"""Tile sizes, grids, splits and scales that the kernels of tree attention share."""

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
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
) -> Mapping[str, Any]:
    """The constants of a kernel that walks over a prefix."""
    return _tile_sizes(_heads(out_THD, tree_key_SHD), max_query_len, max_tree_len)


def finish_sizes(
    out_THD: torch.Tensor,
    tree_key_SHD: torch.Tensor,
    max_query_len: int,
    max_tree_len: int,
    batch: int,
) -> Mapping[str, Any]:
    """The constants of the kernel that only meets the tree: tiles small enough for all SMs."""
    heads = _heads(out_THD, tree_key_SHD)
    return _finish_sizes(heads, max_query_len, max_tree_len, batch)


class _Heads(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


def _heads(out_THD: torch.Tensor, tree_key_SHD: torch.Tensor) -> _Heads:
    _, num_heads, head_dim = out_THD.shape
    return _Heads(num_heads, tree_key_SHD.shape[1], head_dim, out_THD.dtype, out_THD.device)


# Every layer asks, in steps that replay no graph of it.
@functools.lru_cache(maxsize=4096)
def _tile_sizes(heads: _Heads, max_query_len: int, max_tree_len: int) -> Mapping[str, Any]:
    wide = heads.dtype == torch.float32
    packed = max_query_len * (heads.num_heads // heads.num_kv_heads)
    tallest = 64 if heads.head_dim <= 128 and not wide else 32
    # Two tiles of 64 rows become one where that pads no further: keys are read once.
    tall = tallest == 64 and (packed % 128 == 0 or packed % 128 > 64)
    sizes = {
        **_constants(heads),
        "BLOCK_M": 128 if tall else _clamp(packed, tallest),
        # Two sizes at most: each compiles anew, and the levels of a draft are all sizes.
        "BLOCK_S": _clamp(max(max_tree_len, 32), _keys_per_step(heads.head_dim, heads.dtype)),
        "num_warps": 8 if wide or tall else 4,
        "num_stages": 3 if _deep_pipeline(heads) else 2,
    }
    return MappingProxyType(sizes)


@functools.lru_cache(maxsize=4096)
def _finish_sizes(
    heads: _Heads, max_query_len: int, max_tree_len: int, batch: int
) -> Mapping[str, Any]:
    sizes = dict(_tile_sizes(heads, max_query_len, max_tree_len))
    packed = max_query_len * sizes["GROUP"]
    block = min(sizes["BLOCK_M"], 64)
    programs = batch * heads.num_kv_heads
    while block > 16 and triton.cdiv(packed, block) * programs < num_sms(heads.device):
        block //= 2
    warps = 8 if heads.dtype == torch.float32 else 4
    return MappingProxyType(sizes | {"BLOCK_M": block, "num_warps": warps, "num_stages": 1})


def _constants(heads: _Heads) -> dict[str, Any]:
    # The interpreter multiplies bfloat16 as the integers it keeps.
    wide = interpreted() and heads.dtype == torch.bfloat16
    return {
        "GROUP": heads.num_heads // heads.num_kv_heads,
        "HEAD_DIM": heads.head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(heads.head_dim)),
        "TYPE": _TYPES[heads.dtype],
        "DOT": tl.float32 if wide else _TYPES[heads.dtype],
        # float32 means float32: TF32 would cost the identity with plain decoding.
        "PRECISION": "ieee",
    }


def keys_per_step(out_THD: torch.Tensor) -> int:
    """Keys of one step: as many as leave room for two stages in shared memory."""
    return _keys_per_step(out_THD.shape[2], out_THD.dtype)


def _keys_per_step(head_dim: int, dtype: torch.dtype) -> int:
    block = 64 if head_dim <= 128 else 32
    return block // 2 if dtype == torch.float32 else block


def _clamp(size: int, largest: int) -> int:
    """The next power of 2, at least the 16 that a matrix product needs."""
    return min(max(16, triton.next_power_of_2(size)), largest)


def split_prefixes(
    out_THD: torch.Tensor,
    sizes: Mapping[str, Any],
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


def _deep_pipeline(heads: _Heads) -> bool:
    """Whether three stages of keys and values and a tile of 128 rows fit beside each other.

    Two fit into every GPU since Ampere; with three, the next keys travel while a step computes.
    """
    row_bytes = triton.next_power_of_2(heads.head_dim) * heads.dtype.itemsize
    needed = (128 + 3 * 2 * _keys_per_step(heads.head_dim, heads.dtype)) * row_bytes + 4096
    return needed <= shared_memory(heads.device)


def score_scales(scale: float, softcap: float) -> tuple[float, float]:
    """Factors inside and outside of the soft cap; scores come out in base 2."""
    if softcap > 0.0:
        return scale / softcap, softcap * _LOG2_E
    return 0.0, scale * _LOG2_E
