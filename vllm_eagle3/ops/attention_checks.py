"""What the operations of tree attention accept.

Every layer calls them in every step, outside of graphs too: messages are built only for
an error.
"""

import functools

import torch

from vllm_eagle3.config import MAX_NODES
from vllm_eagle3.ops.dispatch import check_same_device, check_vector
from vllm_eagle3.ops.reference import Scale, Scales, Scratch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
E4M3 = torch.float8_e4m3fn
_MAX_HEAD_DIM = 256


def check_tree(
    query_THD: torch.Tensor,
    tree_key_SHD: torch.Tensor,
    tree_value_SHD: torch.Tensor,
    query_start_loc_B1: torch.Tensor,
    tree_start_B: torch.Tensor,
    tree_lens_B: torch.Tensor,
    ancestor_bits_T: torch.Tensor,
    out_THD: torch.Tensor,
    scratch: Scratch | None,
    max_query_len: int,
    max_tree_len: int,
    softcap: float,
) -> None:
    """Check what both operations take."""
    dtype = out_THD.dtype
    if dtype not in FLOATS:
        raise ValueError(f"no tree attention for {dtype}: use bfloat16, float16 or float32")
    _check_rows("out_THD", out_THD, dtype, query_THD)
    _check_rows("query_THD", query_THD, E4M3 if query_THD.dtype == E4M3 else dtype, query_THD)
    _check_rows("tree_key_SHD", tree_key_SHD, dtype, query_THD)
    _check_rows("tree_value_SHD", tree_value_SHD, dtype, query_THD)
    num_rows, num_heads, head_dim = query_THD.shape
    num_kv_heads = tree_key_SHD.shape[1]
    if head_dim > _MAX_HEAD_DIM:
        raise ValueError(
            f"tree attention takes a head dimension of at most {_MAX_HEAD_DIM}, got {head_dim}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} kv heads evenly")
    if tree_value_SHD.shape != tree_key_SHD.shape:
        raise ValueError("tree keys and values must have one shape")
    if out_THD.shape[0] < num_rows or out_THD.shape[1] != num_heads:
        raise ValueError(
            f"out_THD must be [at least {num_rows}, {num_heads}, {head_dim}], got "
            f"{tuple(out_THD.shape)}"
        )
    check_vector("query_start_loc_B1", query_start_loc_B1, 2, torch.int32)
    batch = query_start_loc_B1.shape[0] - 1
    check_vector("tree_start_B", tree_start_B, batch, torch.int32)
    check_vector("tree_lens_B", tree_lens_B, batch, torch.int32)
    check_vector("ancestor_bits_T", ancestor_bits_T, num_rows, torch.int64)
    if max_query_len < 1:
        raise ValueError(f"max_query_len must be at least 1, got {max_query_len}")
    if not 1 <= max_tree_len <= MAX_NODES:
        raise ValueError(f"max_tree_len must be between 1 and {MAX_NODES}, got {max_tree_len}")
    if softcap < 0.0:
        raise ValueError(f"softcap must not be negative, got {softcap}")
    check_same_device(
        query_THD=query_THD,
        tree_key_SHD=tree_key_SHD,
        tree_value_SHD=tree_value_SHD,
        out_THD=out_THD,
        query_start_loc_B1=query_start_loc_B1,
        tree_start_B=tree_start_B,
        tree_lens_B=tree_lens_B,
        ancestor_bits_T=ancestor_bits_T,
    )
    if scratch is not None:
        _check_scratch(scratch, tree_key_SHD, num_rows)


def _check_rows(name: str, rows: torch.Tensor, dtype: torch.dtype, query_THD: torch.Tensor) -> None:
    if (
        rows.dim() != 3
        or rows.shape[2] != query_THD.shape[2]
        or rows.stride(2) != 1
        or rows.dtype != dtype
    ):
        raise ValueError(
            f"{name} must be [rows, heads, head dim] of {dtype} with a contiguous head of the "
            f"query's size, got {rows.dtype} {tuple(rows.shape)}, strides {rows.stride()}"
        )


def _check_scratch(scratch: Scratch, tree_key_SHD: torch.Tensor, num_rows: int) -> None:
    keys, values = scratch
    for name, rows in (("scratch keys", keys), ("scratch values", values)):
        _check_rows(name, rows, tree_key_SHD.dtype, tree_key_SHD)
    if keys.shape != values.shape or keys.stride() != values.stride():
        raise ValueError("scratch keys and values must have one shape and the same strides")
    if keys.shape[1] != tree_key_SHD.shape[1] or tree_key_SHD.shape[0] < num_rows:
        raise ValueError(
            f"with scratch buffers of {keys.shape[1]} heads, tree_key_SHD must be [at least "
            f"{num_rows}, {keys.shape[1]}, head dim], got {tuple(tree_key_SHD.shape)}"
        )
    check_same_device(tree_key_SHD=tree_key_SHD, scratch_keys=keys, scratch_values=values)


def check_cache(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table_BP: torch.Tensor,
    prefix_lens_B: torch.Tensor,
    tree_key_SHD: torch.Tensor,
    batch: int,
    dtype: torch.dtype,
) -> None:
    """Check the paged prefix, whose values must be of ``dtype``."""
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if (
            cache.dim() != 4
            or cache.shape != key_cache.shape
            or cache.shape[2:] != tree_key_SHD.shape[1:]
            or cache.stride(3) != 1
            or cache.dtype != dtype
        ):
            raise ValueError(
                f"{name} must be [blocks, block size, kv heads, head dim] of {dtype} with a "
                f"contiguous head, got {cache.dtype} {tuple(cache.shape)}, strides "
                f"{cache.stride()}" + (": give k_scale and v_scale" if cache.dtype == E4M3 else "")
            )
    if (
        block_table_BP.dim() != 2
        or block_table_BP.shape[0] < batch
        or block_table_BP.stride(1) != 1
        or block_table_BP.dtype != torch.int32
    ):
        raise ValueError(
            f"block_table_BP must be int32 [at least {batch}, pages] with contiguous rows, got "
            f"{block_table_BP.dtype} {tuple(block_table_BP.shape)}"
        )
    check_vector("prefix_lens_B", prefix_lens_B, batch, torch.int32)
    check_same_device(
        tree_key_SHD=tree_key_SHD,
        key_cache=key_cache,
        value_cache=value_cache,
        block_table_BP=block_table_BP,
        prefix_lens_B=prefix_lens_B,
    )


@functools.cache
def check_e4m3(device: torch.device) -> None:
    """Raise ``ValueError`` for a GPU whose kernels cannot read e4m3."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no e4m3: serve with --kv-cache-dtype auto"
        )


def check_scales(
    query_THD: torch.Tensor,
    q_scale: Scale | None,
    k_scale: Scale | None,
    v_scale: Scale | None,
) -> Scales | None:
    """The scales of an e4m3 cache, None if the cache is not quantised."""
    if (query_THD.dtype == E4M3) != (q_scale is not None):
        raise ValueError(f"q_scale belongs to an e4m3 query, got {q_scale} with {query_THD.dtype}")
    if (k_scale is None) != (v_scale is None):
        raise ValueError("give k_scale and v_scale of an e4m3 cache, or neither")
    if k_scale is None:
        if q_scale is not None:
            raise ValueError("an e4m3 query needs an e4m3 cache: give k_scale and v_scale, too")
        return None
    check_e4m3(query_THD.device)
    given = [scale for scale in (q_scale, k_scale, v_scale) if scale is not None]
    tensors = [scale for scale in given if torch.is_tensor(scale)]
    if len(tensors) not in (0, len(given)):
        raise ValueError("give all of q_scale, k_scale and v_scale as floats or all as tensors")
    for scale in tensors:
        if scale.numel() != 1 or scale.dtype != torch.float32 or scale.device != query_THD.device:
            raise ValueError(
                f"a scale must be a float32 tensor of one element on {query_THD.device}, got "
                f"{scale.dtype} {tuple(scale.shape)} on {scale.device}: scales of single heads "
                "are not supported"
            )
    return q_scale, k_scale, v_scale
