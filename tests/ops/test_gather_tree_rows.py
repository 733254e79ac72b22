"""Trees into the rows of a batch: bits, positions and prefix lengths."""

import pytest
import torch

from tests.ops.setups import (
    ALL_IMPLS,
    DEVICE,
    ancestors,
    cumulative,
    int32,
    int64,
    mixed_batch,
    random_parents,
    word,
    words,
)
from vllm_eagle3.ops import gather_tree_rows

UNTOUCHED = -7


def expect(batch, parents, prefixes):
    """Row by row, from the definition."""
    bits, positions = [UNTOUCHED] * batch.num_tokens, [UNTOUCHED] * batch.num_tokens
    for b, root in enumerate(batch.roots):
        for i in range(batch.prefill[b]):
            row = root - batch.prefill[b] + i
            bits[row], positions[row] = 0, prefixes[b] - batch.prefill[b] + i
        for node in range(batch.nodes[b]):
            has_tree = 0 <= batch.slots[b] < len(parents) and batch.nodes[b] > 1
            path = ancestors(parents[batch.slots[b]], node) if has_tree else range(node + 1)
            bits[root + node], positions[root + node] = word(path), prefixes[b] + len(path) - 1
    return int64(bits), int64(positions)


def run(batch, parents, prefixes, impl, room=0):
    """``prefixes``: tokens before each request's tree; a prefill's own rows included."""
    linear = torch.full((batch.num_tokens,), 999, dtype=torch.int64)
    for b, root in enumerate(batch.roots):
        first = root - batch.prefill[b]
        count = batch.prefill[b] + batch.nodes[b]
        start = prefixes[b] - batch.prefill[b]
        linear[first : first + count] = torch.arange(start, start + count)
    seq_lens = [prefix + nodes for prefix, nodes in zip(prefixes, batch.nodes, strict=True)]
    out_bits, out_positions = (torch.full_like(linear, UNTOUCHED).to(DEVICE) for _ in range(2))
    out_prefix_lens = torch.full((len(seq_lens) + room,), 99, dtype=torch.int32, device=DEVICE)
    gather_tree_rows(
        int64([words(p) for p in parents]),
        int32([[len(ancestors(p, node)) - 1 for node in range(len(p))] for p in parents]),
        **batch.rows,
        linear_positions_T=linear.to(DEVICE),
        out_bits_T=out_bits,
        out_positions_T=out_positions,
        out_prefix_lens_B=out_prefix_lens,
        seq_lens_B=int32(seq_lens),
        impl=impl,
    )
    return out_bits, out_positions, out_prefix_lens


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize(("seed", "num_nodes"), [(0, 2), (1, 9), (2, 16), (3, 33), (4, 64)])
def test_mixed_batch(impl, seed, num_nodes):
    batch = mixed_batch(seed, num_slots=9, num_nodes=num_nodes)
    parents = [random_parents(10 * seed + slot, num_nodes, detached=0.2) for slot in range(9)]
    prefixes = [40 + 90 * b for b in range(len(batch.slots))]
    bits, positions, prefix_lens = run(batch, parents, prefixes, impl, room=3)
    expected_bits, expected_positions = expect(batch, parents, prefixes)
    assert torch.equal(bits, expected_bits)
    assert torch.equal(positions, expected_positions)
    has_rows = [p + n > 0 for p, n in zip(batch.prefill, batch.nodes, strict=True)]
    expected = [prefix if rows else 0 for prefix, rows in zip(prefixes, has_rows, strict=True)]
    assert prefix_lens.tolist() == [*expected, 0, 0, 0]


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_first_token_of_a_sequence(impl):
    batch = mixed_batch(5, num_slots=8, num_nodes=4)
    parents = [random_parents(slot, 4) for slot in range(8)]
    prefixes = [0] * len(batch.slots)
    prefixes[3] = batch.prefill[3]
    bits, positions, prefix_lens = run(batch, parents, prefixes, impl)
    expected_bits, expected_positions = expect(batch, parents, prefixes)
    assert torch.equal(bits, expected_bits)
    assert torch.equal(positions, expected_positions)
    assert prefix_lens.tolist() == [0, 0, 0, batch.prefill[3], 0, 0, 0, 0]


def test_wrong_arguments_are_named():
    tree, rows = torch.ones(2, 4, dtype=torch.int64), cumulative([4]).cpu()
    arguments = {
        "ancestor_bits_RN": tree,
        "depths_RN": tree.int(),
        "idx_mapping_B": torch.zeros(1, dtype=torch.int64),
        "query_start_loc_B1": rows,
        "cu_num_logits_B1": rows,
        "linear_positions_T": torch.arange(4),
        "out_bits_T": torch.zeros(4, dtype=torch.int64),
        "out_positions_T": torch.zeros(4, dtype=torch.int64),
        "out_prefix_lens_B": torch.zeros(1, dtype=torch.int32),
        "seq_lens_B": torch.full((1,), 9, dtype=torch.int32),
    }
    gather_tree_rows(**arguments)
    for name in arguments:
        with pytest.raises(ValueError, match=name.split("_")[0]):
            gather_tree_rows(**(arguments | {name: arguments[name].float()}))
