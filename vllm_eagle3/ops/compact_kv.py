"""The accepted path's KV entries move to consecutive slots, in all layers at once."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch

from vllm_eagle3.ops.accepted_row_index import accepted_moves
from vllm_eagle3.ops.dispatch import (
    Impl,
    check,
    check_matrix,
    check_rows,
    check_same_device,
    check_vector,
    resolve,
)

_WORDS = (8, 4, 2, 1)  # bytes that one lane may copy at once, widest first


@dataclass(frozen=True)
class KVCacheTable:
    """Where each layer's KV cache is.

    On a GPU this holds addresses and no tensors, so that it keeps no cache alive: build it
    again whenever the engine allocates its caches again (vLLM does, after profiling). On
    the CPU it holds the tensors, for the torch implementation.

    Attributes:
        layout_L6: int64 on the device, for each layer: address, strides of block, head and
            token in words, block size, group.
        word_bytes: bytes of one word: the widest that divides every address, stride and row.
        vector_bytes: 16 where that divides them, too; else the bytes of a word.
        num_words: words of one head's entry for one token, the most of all layers.
        num_words_L: the same for each layer, int32 on the device.
        num_heads_L: KV heads of each layer, int32 on the device.
        num_heads: the most of all layers.
        num_groups: KV cache groups, one more than the highest group of a layer.
        layers: ``(cache, group)`` of each layer on the CPU; empty on a GPU.
    """

    layout_L6: torch.Tensor
    word_bytes: int
    vector_bytes: int
    num_words: int
    num_words_L: torch.Tensor
    num_heads_L: torch.Tensor
    num_heads: int
    num_groups: int
    layers: tuple[tuple[torch.Tensor, int], ...]

    @classmethod
    def from_layers(cls, layers: Iterable[tuple[torch.Tensor, int]]) -> Self:
        """Describe the caches of all layers.

        Args:
            layers: for each layer its cache, logical ``[blocks, kv heads, block size,
                content]`` with any strides but contiguous content (the keys and values of
                one head for one token, and scales stored inline), and its KV cache group.
                A cache that several layers of a group share is taken once; groups may
                overlay each other in one allocation, of which they own different blocks.

        Raises:
            ValueError: no layer, or a cache of another rank, device or layout.
        """
        unique: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}
        for cache, group in layers:
            _check_cache(cache, group)
            shared, _ = unique.setdefault((cache.data_ptr(), group), (cache, group))
            check(
                shared.shape == cache.shape
                and shared.stride() == cache.stride()
                and shared.dtype == cache.dtype,
                "two layers share one KV cache but see it with different shapes: "
                "draft trees cannot compact such a cache",
            )
        check(bool(unique), "no layer with a KV cache to compact")
        caches = list(unique.values())
        device = caches[0][0].device
        check(
            all(cache.device == device for cache, _ in caches),
            "the KV caches of all layers must be on one device",
        )
        word_bytes = next(w for w in _WORDS if all(_is_divisible(cache, w) for cache, _ in caches))

        def words(cache: torch.Tensor, elements: int) -> int:
            return elements * cache.element_size() // word_bytes

        num_words = [words(cache, cache.shape[3]) for cache, _ in caches]
        num_heads = [cache.shape[1] for cache, _ in caches]
        layout = [
            [
                cache.data_ptr(),
                *(words(cache, stride) for stride in cache.stride()[:3]),
                cache.shape[2],
                group,
            ]
            for cache, group in caches
        ]
        return cls(
            layout_L6=torch.tensor(layout, dtype=torch.int64, device=device),
            word_bytes=word_bytes,
            vector_bytes=16 if all(_is_divisible(cache, 16) for cache, _ in caches) else word_bytes,
            num_words=max(num_words),
            num_words_L=torch.tensor(num_words, dtype=torch.int32, device=device),
            num_heads_L=torch.tensor(num_heads, dtype=torch.int32, device=device),
            num_heads=max(num_heads),
            num_groups=max(group for _, group in caches) + 1,
            layers=tuple(caches) if device.type == "cpu" else (),
        )

    @property
    def num_layers(self) -> int:
        """Different caches (L)."""
        return self.layout_L6.shape[0]


def _check_cache(cache: torch.Tensor, group: int) -> None:
    check(
        cache.dim() == 4,
        "a KV cache must be [blocks, kv heads, block size, content], got shape "
        f"{tuple(cache.shape)}: draft trees cannot compact this attention's cache",
    )
    check(cache.numel() > 0, f"a KV cache is empty: shape {tuple(cache.shape)}")
    check(
        cache.stride(3) == 1,
        f"the content of a KV cache must be contiguous, got strides {cache.stride()}",
    )
    check(group >= 0, f"a KV cache group must not be negative, got {group}")


def _is_divisible(cache: torch.Tensor, word_bytes: int) -> bool:
    elements = (cache.shape[3], *cache.stride()[:3])
    return cache.data_ptr() % word_bytes == 0 and all(
        count * cache.element_size() % word_bytes == 0 for count in elements
    )


def compact_kv(
    table: KVCacheTable,
    slot_mappings_GT: torch.Tensor,
    path_RN: torch.Tensor,
    path_len_R: torch.Tensor,
    idx_mapping_B: torch.Tensor,
    query_start_loc_B1: torch.Tensor,
    cu_num_logits_B1: torch.Tensor,
    *,
    impl: Impl = "auto",
) -> None:
    """Move the accepted nodes' KV entries to where plain decoding would have put them.

    The last L rows of request b are its tree, L being its rows of logits. In each layer of
    group g, the entry at the slot of row ``path[i]`` moves to the slot of row i of the tree,
    for ``i < path_len``. Requests without a slot (``idx_mapping < 0``) are left alone, and
    so are cache slots below 0.

    Must run after the forward and before anything else reads these blocks or changes the
    slot mappings.

    Args:
        table: the caches, modified.
        slot_mappings_GT: int64 cache slot of each row, for each KV cache group; contiguous
            in its last dimension.
        path_RN, path_len_R: int32, as in :class:`~vllm_eagle3.tree.types.TreeBuffers`.
        idx_mapping_B: int32 or int64 request slot; its length is the batch size.
        query_start_loc_B1: int32 first row of each request, and the end.
        cu_num_logits_B1: int32 cumulative rows of logits.

    Raises:
        ValueError: a tensor of another type, layout, size or device; ``impl="torch"`` for
            caches on a GPU, of which the table has addresses only.
    """
    batch = idx_mapping_B.shape[0]
    num_groups, num_rows = slot_mappings_GT.shape
    check_rows("slot_mappings_GT", slot_mappings_GT, num_rows, torch.int64)
    if num_groups < table.num_groups:
        raise ValueError(
            f"slot_mappings_GT has {num_groups} KV cache groups, the layers use {table.num_groups}"
        )
    check_matrix("path_RN", path_RN, torch.int32)
    check_vector("path_len_R", path_len_R, path_RN.shape[0], torch.int32)
    check_vector("idx_mapping_B", idx_mapping_B, 1, torch.int32, torch.int64)
    check_vector("query_start_loc_B1", query_start_loc_B1, batch + 1, torch.int32)
    check_vector("cu_num_logits_B1", cu_num_logits_B1, batch + 1, torch.int32)
    check_same_device(
        kv_caches=table.layout_L6,
        slot_mappings_GT=slot_mappings_GT,
        path_RN=path_RN,
        path_len_R=path_len_R,
        idx_mapping_B=idx_mapping_B,
        query_start_loc_B1=query_start_loc_B1,
        cu_num_logits_B1=cu_num_logits_B1,
    )
    chosen = resolve(impl, path_RN.device, ("extension", "triton"))
    if chosen == "extension":
        run = _compact_kv_extension
    elif chosen == "triton":
        from vllm_eagle3.ops.kernels.compact_kv import launch as run
    else:
        check(bool(table.layers), 'impl="torch" compacts KV caches on the CPU only')
        run = _compact_kv_torch
    run(
        table,
        slot_mappings_GT,
        path_RN,
        path_len_R,
        idx_mapping_B,
        query_start_loc_B1,
        cu_num_logits_B1,
    )


def _compact_kv_extension(table: KVCacheTable, *tensors: torch.Tensor) -> None:
    torch.ops.vllm_eagle3.compact_kv(
        table.layout_L6,
        table.num_words_L,
        table.num_heads_L,
        table.num_heads,
        table.word_bytes,
        table.vector_bytes,
        *tensors,
    )


def _compact_kv_torch(
    table: KVCacheTable,
    slot_mappings_GT: torch.Tensor,
    path_RN: torch.Tensor,
    path_len_R: torch.Tensor,
    idx_mapping_B: torch.Tensor,
    query_start_loc_B1: torch.Tensor,
    cu_num_logits_B1: torch.Tensor,
) -> None:
    root_B, on_path_BN, source_BN = accepted_moves(
        path_RN, path_len_R, idx_mapping_B, query_start_loc_B1, cu_num_logits_B1
    )
    nodes_N = torch.arange(path_RN.shape[1], device=path_RN.device)
    request_M, place_M = torch.nonzero(on_path_BN & (source_BN != nodes_N), as_tuple=True)
    target_row_M = root_B[request_M] + place_M
    source_row_M = root_B[request_M] + source_BN[request_M, place_M]
    for cache, group in table.layers:
        target_M = slot_mappings_GT[group, target_row_M]
        source_M = slot_mappings_GT[group, source_row_M]
        valid_M = (target_M >= 0) & (source_M >= 0)
        target_M, source_M = target_M[valid_M], source_M[valid_M]
        block_size = cache.shape[2]
        # Indexing copies, so all rows are read before any is written.
        moved_MHC = cache[source_M // block_size, :, source_M % block_size]
        cache[target_M // block_size, :, target_M % block_size] = moved_MHC
