"""Compaction in place against a gather, in caches as vLLM lays them out."""

import random

import pytest
import torch

from tests.ops.setups import ALL_IMPLS, DEVICE, Batch, int32, int64, mixed_batch, random_paths
from vllm_eagle3.ops import KVCacheTable, compact_kv


def device_of(impl: str) -> torch.device:
    """On a GPU the table has addresses only, which torch cannot use."""
    return torch.device("cpu") if impl == "torch" else DEVICE


def make_cache(blocks, heads, page, content, dtype, heads_first, device):
    """A logical [blocks, heads, page, content] view of distinct values."""
    shape = (blocks, heads, page) if heads_first else (blocks, page, heads)
    count = blocks * heads * page * content
    values = torch.arange(count, dtype=torch.float64).remainder(251).to(dtype)
    cache = values.view(*shape, content).to(device)
    return cache if heads_first else cache.transpose(1, 2)


def moved(cache, slots, batch, paths):
    """All rows are read before any is written."""
    page, result = cache.shape[2], cache.clone()
    for root, path in zip(batch.roots, paths, strict=True):
        for place, node in enumerate(path):
            target, source = slots[root + place], slots[root + node]
            if target >= 0 and source >= 0:
                result[target // page, :, target % page] = cache[source // page, :, source % page]
    return result


def check(layers, slot_mappings, batch, path_RN, path_len_R, paths, impl):
    device = device_of(impl)
    expected = [moved(cache, slot_mappings[group], batch, paths) for cache, group in layers]
    compact_kv(
        KVCacheTable.from_layers(layers),
        torch.tensor(slot_mappings, dtype=torch.int64, device=device),
        path_RN.to(device),
        path_len_R.to(device),
        **{name: tensor.to(device) for name, tensor in batch.rows.items()},
        impl=impl,
    )
    for (cache, _), after in zip(layers, expected, strict=True):
        assert torch.equal(cache, after)


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.float16])
@pytest.mark.parametrize("seed", range(2))
def test_layers_groups_and_layouts(impl, dtype, seed):
    """Layers of two groups, other strides, head counts and pages; a slot below 0."""
    num_nodes, device = 12, device_of(impl)
    batch = mixed_batch(seed, num_slots=9, num_nodes=num_nodes)
    path_RN, path_len_R, paths = random_paths(seed, batch, 9, num_nodes)
    rng = random.Random(seed)
    slot_mappings = [rng.sample(range(20 * 16), batch.num_tokens) for _ in range(2)]
    slot_mappings[1][batch.roots[0] + 1] = -1
    layers = [
        (make_cache(20, 2, 16, 24, dtype, False, device), 0),
        (make_cache(10, 3, 32, 24, dtype, True, device), 1),
        (make_cache(20, 1, 16, 40, dtype, False, device), 0),
    ]
    layers.append(layers[0])  # two layers that share a cache
    check(layers, slot_mappings, batch, path_RN, path_len_R, paths, impl)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_groups_that_overlay_one_allocation(impl):
    """As vLLM lays out full and sliding-window layers: one cache, blocks of either group."""
    batch = Batch([0], [0], [5])
    cache = make_cache(4, 2, 16, 8, torch.float32, False, device_of(impl))
    slots = [[5, 17, 9, 2, 30], [33, 47, 60, 35, 50]]
    path = [0, 2, 4]
    expected = cache
    for group in slots:
        expected = moved(expected, group, batch, [path])
    table = KVCacheTable.from_layers([(cache, 0), (cache, 0), (cache, 1)])
    assert table.num_layers == 2
    rows = {name: tensor.to(cache.device) for name, tensor in batch.rows.items()}
    path_RN, path_len_R = int32([[*path, 0, 0]]), int32([3])
    compact_kv(
        table,
        int64(slots).to(cache.device),
        path_RN.to(cache.device),
        path_len_R.to(cache.device),
        **rows,
        impl=impl,
    )
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("content", [1, 2, 3, 6, 20])
def test_any_word_size(impl, content):
    batch = Batch([0], [0], [5])
    layers = [(make_cache(3, 2, 16, content, torch.uint8, False, device_of(impl)), 0)]
    path = [0, 2, 4]
    rows = int32([[*path, 0, 0]]), int32([3])
    check(layers, [[5, 33, 17, 2, 9]], batch, *rows, [path], impl)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_every_path_through_five_nodes(impl):
    """Source of one move and destination of another, in all ways there are."""
    paths = [[0, *(n for n in range(1, 5) if bits >> (n - 1) & 1)] for bits in range(16)]
    batch = Batch(list(range(16)), [0] * 16, [5] * 16)
    path_RN = int32([path + [0] * (5 - len(path)) for path in paths])
    path_len_R = int32([len(path) for path in paths])
    layers = [(make_cache(6, 2, 16, 8, torch.int32, False, device_of(impl)), 0)]
    check(layers, [list(range(3, 83))], batch, path_RN, path_len_R, paths, impl)


def test_a_table_refuses_what_it_cannot_copy():
    cache = torch.zeros(4, 2, 16, 8)
    with pytest.raises(ValueError, match="no layer"):
        KVCacheTable.from_layers([])
    with pytest.raises(ValueError, match=r"must be \[blocks"):
        KVCacheTable.from_layers([(torch.zeros(2, 4, 16, 2, 8), 0)])
    with pytest.raises(ValueError, match="contiguous"):
        KVCacheTable.from_layers([(cache.transpose(2, 3), 0)])
    with pytest.raises(ValueError, match="share one KV cache"):
        KVCacheTable.from_layers([(cache, 0), (cache[:, :1], 0)])


def test_too_few_slot_mappings_are_refused():
    table = KVCacheTable.from_layers([(torch.zeros(4, 2, 16, 8, device=DEVICE), 1)])
    batch = Batch([0], [0], [2])
    with pytest.raises(ValueError, match="KV cache groups"):
        compact_kv(table, int64([[0, 1]]), int32([[0, 1]]), int32([2]), **batch.rows)
