"""What ``bench attention`` compares: attention of one layer over paged prefixes, cold in L2."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_eagle3 import ops

# vLLM's bound on FlashAttention 3's splits in CUDA graphs.
MAX_SPLITS = 32
_DRAFT_LEVELS = 5  # of a draft's tree: the last level sees the rows of all

CAUSAL, FINISH, PORTABLE = "fa3_causal", "fa3_finish", "portable"


@dataclass(frozen=True)
class Model:
    """One attention layer: query and kv heads, head dimension, tokens of a page, type."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page: int = 16
    dtype: torch.dtype = torch.bfloat16

    @property
    def token_bytes(self) -> int:
        """Key and value of one token."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Cell:
    """One comparison: requests, tokens in each one's cache, and query rows of each.

    In a ``draft`` cell the rows are a level of the draft's trees, the levels before it are in
    scratch buffers, and the rival is the chain, which drafts with one row.
    """

    context: int
    batch: int
    rows: int
    draft: bool = False


class Pool:
    """A paged cache, larger than L2, of which every call reads other pages."""

    def __init__(self, model: Model, num_tokens: int, device: torch.device) -> None:
        self.model, self.device = model, device
        num_pages = -(-num_tokens // model.page)
        shape = (num_pages, model.page, model.kv_heads, 2 * model.head_dim)
        cache = torch.empty(shape, dtype=model.dtype, device=device).normal_()
        self.key_cache, self.value_cache = cache.split(model.head_dim, dim=-1)
        self._order = torch.randperm(num_pages, device=device).int()

    def block_tables(self, cell: Cell, count: int) -> list[torch.Tensor]:
        """``count`` tables ``[batch, pages]`` for contexts and rows; no two share a page as
        long as the pool has enough."""
        pages = -(-(cell.context + cell.rows) // self.model.page)
        used = cell.batch * pages
        wrapped = torch.arange(count * used, device=self.device) % len(self._order)
        return list(self._order[wrapped].view(count, cell.batch, pages).unbind())


class Inputs:
    """Rows, trees and lengths of a cell; the caches of all calls are apart."""

    def __init__(self, model: Model, cell: Cell, pool: Pool, calls: int) -> None:
        device = pool.device
        batch, rows = cell.batch, cell.rows
        nodes = rows * _DRAFT_LEVELS if cell.draft else rows
        self.model, self.cell, self.pool = model, cell, pool
        self.tables = pool.block_tables(cell, calls)

        def randn(count: int, heads: int) -> torch.Tensor:
            return torch.randn(count, heads, model.head_dim, dtype=model.dtype, device=device)

        def int32(values: Any) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.int32, device=device)

        self.query = randn(batch * rows, model.heads)
        self.key, self.value = (
            randn(batch * rows, model.kv_heads),
            randn(batch * rows, model.kv_heads),
        )
        self.out = torch.empty_like(self.query)
        self.starts = int32(range(0, batch * rows + 1, rows))
        self.prefix_lens = int32([cell.context] * batch)
        self.seq_lens = self.prefix_lens + rows
        self.tree_lens = int32([nodes] * batch)
        self.scratch = None
        self.tree_start = self.starts[:-1]
        if cell.draft:
            self.scratch = (
                randn(batch * nodes, model.kv_heads),
                randn(batch * nodes, model.kv_heads),
            )
            self.tree_start = self.starts[:-1] * _DRAFT_LEVELS
        bits = [sum(1 << node for node in _ancestors(nodes - rows + row)) for row in range(rows)]
        signed = [word - (1 << 64) if word >> 63 else word for word in bits]
        self.bits = torch.tensor(signed * batch, device=device)
        self.tree = {
            "query_start_loc_B1": self.starts,
            "tree_start_B": self.tree_start,
            "tree_lens_B": self.tree_lens,
            "ancestor_bits_T": self.bits,
            "scale": model.head_dim**-0.5,
            "max_query_len": rows,
            "max_tree_len": nodes,
            "scratch": self.scratch,
        }


def _ancestors(node: int) -> list[int]:
    """A tree in which node i hangs below (i - 1) // 2: as deep as a draft's, or so."""
    path = [node]
    while path[-1]:
        path.append((path[-1] - 1) // 2)
    return path


Call = Callable[[torch.Tensor], torch.Tensor]


def portable(inputs: Inputs) -> Call:
    """Our kernels alone."""

    def call(table: torch.Tensor) -> torch.Tensor:
        return ops.tree_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.pool.key_cache,
            inputs.pool.value_cache,
            table,
            inputs.prefix_lens,
            out_THD=inputs.out,
            max_prefix_len=inputs.cell.context,
            **inputs.tree,
        )

    return call


def fa3_finish(inputs: Inputs) -> Call:
    """FlashAttention 3 over the prefix, our kernel over the tree, as in the engine."""
    attend = _flash_attention(
        inputs, inputs.query, inputs.out, inputs.starts, inputs.prefix_lens, causal=False
    )

    def call(table: torch.Tensor) -> torch.Tensor:
        _, lse = attend(table)
        return ops.finish_tree_attention(
            inputs.query, inputs.key, inputs.value, inputs.out, lse, **inputs.tree
        )

    return call


def fa3_causal(inputs: Inputs) -> Call:
    """The rival: the same number of rows as a chain, already in the cache; a chain drafts with
    one row."""
    query, out, starts, lens = inputs.query, inputs.out, inputs.starts, inputs.seq_lens
    if inputs.cell.draft:
        query, out = query[: inputs.cell.batch], torch.empty_like(out[: inputs.cell.batch])
        starts, lens = inputs.starts // inputs.cell.rows, inputs.prefix_lens + 1
    attend = _flash_attention(inputs, query, out, starts, lens, causal=True)

    def call(table: torch.Tensor) -> torch.Tensor:
        return attend(table)[0]

    return call


SIDES = {CAUSAL: fa3_causal, FINISH: fa3_finish, PORTABLE: portable}


def _flash_attention(
    inputs: Inputs,
    query: torch.Tensor,
    out: torch.Tensor,
    starts: torch.Tensor,
    seq_lens: torch.Tensor,
    causal: bool,
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """A call of FlashAttention 3, planned ahead as vLLM does for the layers of a step."""
    from vllm_eagle3.engine.compat import (
        canonicalize_singleton_dim_strides,
        flash_attn_varlen_func,
        get_scheduler_metadata,
    )

    model, batch = inputs.model, inputs.cell.batch
    max_query_len = query.shape[0] // batch
    max_seq_len = int(seq_lens.max())
    plan = get_scheduler_metadata(
        batch_size=batch,
        max_seqlen_q=max_query_len,
        max_seqlen_k=max_seq_len,
        num_heads_q=model.heads,
        num_heads_kv=model.kv_heads,
        headdim=model.head_dim,
        cache_seqlens=seq_lens,
        qkv_dtype=model.dtype,
        cu_seqlens_q=starts,
        page_size=model.page,
        causal=causal,
        num_splits=MAX_SPLITS,
    )
    return functools.partial(
        lambda table, **settings: flash_attn_varlen_func(block_table=table, **settings),
        q=query,
        k=canonicalize_singleton_dim_strides(inputs.pool.key_cache),
        v=canonicalize_singleton_dim_strides(inputs.pool.value_cache),
        out=out,
        cu_seqlens_q=starts,
        max_seqlen_q=max_query_len,
        seqused_k=seq_lens,
        max_seqlen_k=max_seq_len,
        softmax_scale=model.head_dim**-0.5,
        causal=causal,
        return_softmax_lse=True,
        scheduler_metadata=plan,
        num_splits=MAX_SPLITS,
        fa_version=3,
    )
