"""Trees written to their slots against the reference reranking, exactly."""

import pytest
import torch

from tests.ops.rounds import SENTINEL, STATIC, WHERE, Round, random_round
from vllm_eagle3 import ops
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.tree.chain import best_chain
from vllm_eagle3.tree.rerank import rerank
from vllm_eagle3.tree.static import StaticTree
from vllm_eagle3.tree.types import NO_PARENT, GrowthBuffers, TreeBuffers

FIELDS = ("tokens", "parents", "depths", "ancestor_bits", "scores")
# Nodes below the root, depth, top-k.
SHAPES = [
    (1, 1, 1),
    (5, 1, 5),
    (63, 63, 1),
    (40, 65, 1),
    (7, 3, 4),
    (31, 6, 8),
    (63, 6, 8),
    (63, 5, 16),
    (16, 4, 11),
    (63, 2, 64),
]
SLOTS = [6, -1, 0, 3, 9]
CHAIN_ONLY = [True, True, False, False, True, False, False, True]  # slots 6 and 3: trees


def detached(num_nodes: int) -> dict[str, list]:
    """Nodes of which none is ever accepted; the values of the verification's own detach."""
    nodes = range(1, num_nodes)
    bits = [1, *(1 | 1 << node for node in nodes)]
    return {
        "tokens": [0] * num_nodes,
        "parents": [NO_PARENT] * num_nodes,
        "depths": [0, *(1 for _ in nodes)],
        "ancestor_bits": [word - (1 << 64) if word >> 63 else word for word in bits],
        "scores": [0.0] * num_nodes,
    }


def check_trees(case: Round, slots, chain_only, num_nodes: int, level: int | None = None) -> None:
    level = level or len(case.levels)
    buffers, drafts = case.build(slots, chain_only, num_nodes, level)
    expansion = case.expected(level)
    static = StaticTree.of(case.config)
    kept_M = static and static.kept(level)[: num_nodes - 1]
    num_candidates = expansion.scores_BC.shape[1] if kept_M is None else len(kept_M)
    num_filled = min(num_nodes, num_candidates + 1)
    tree = rerank(expansion, num_filled, kept_M=kept_M)
    chain = best_chain(tree, level)
    fill = detached(num_nodes)
    unwritten = set(range(len(chain_only)))
    for b, slot in enumerate(slots):
        has_slot = 0 <= slot < len(chain_only)
        source = chain if has_slot and chain_only[slot] else tree
        for name in FIELDS:
            expected = getattr(source, f"{name}_BN")[b].tolist() + fill[name][num_filled:]
            if has_slot:
                unwritten.discard(slot)
                assert getattr(buffers, f"{name}_RN")[slot].tolist() == expected, (name, b)
            if name == "tokens":
                assert drafts[b, : num_nodes - 1].tolist() == expected[1:]
    for slot in unwritten:
        for name in FIELDS:
            assert getattr(buffers, f"{name}_RN")[slot].eq(SENTINEL).all()
    assert drafts[len(slots) :].eq(SENTINEL).all()
    assert drafts[:, num_nodes - 1 :].eq(SENTINEL).all()


@pytest.mark.parametrize("kind", ["random", "ties", "all equal", "spoiled"])
@pytest.mark.parametrize(("num_drafts", "depth", "top_k"), SHAPES)
@pytest.mark.parametrize(("impl", "device"), WHERE)
def test_whole_rounds_equal_the_reference(impl, device, num_drafts, depth, top_k, kind):
    case = random_round(
        TreeConfig(num_drafts, depth, top_k),
        impl,
        device,
        batch=len(SLOTS),
        seed=num_drafts,
        step={"ties": 0.5, "all equal": 100.0}.get(kind),
        spoiled=kind == "spoiled",
    )
    case.offer_all()
    check_trees(case, SLOTS, CHAIN_ONLY, num_drafts + 1)


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize(("impl", "device"), WHERE)
def test_a_round_that_ends_early_leaves_detached_nodes(impl, device, level):
    """4, 20 and 36 candidates for 30 nodes; the levels below are of an earlier round."""
    case = random_round(TreeConfig(30, 4, 4), impl, device, batch=len(SLOTS), seed=level)
    case.offer_all()
    check_trees(case, SLOTS, CHAIN_ONLY, 31, level)


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize(("impl", "device"), WHERE)
def test_a_static_tree_keeps_its_paths(impl, device, level):
    """Down to the level that was grown; the chain is that of the best children."""
    config = TreeConfig.static([[0], [1], [1, 0], [0, 0], [1, 0, 0], [2]])
    case = random_round(config, impl, device, batch=len(SLOTS), seed=level).offer_all()
    check_trees(case, SLOTS, CHAIN_ONLY, config.num_nodes, level)


@pytest.mark.parametrize("num_drafts", range(1, 26))
@pytest.mark.parametrize(("impl", "device"), WHERE)
def test_the_first_nodes_of_eagle_1s_tree(impl, device, num_drafts):
    """As a larger batch grows them, in slots with room for all 25."""
    whole = STATIC["published"]
    config = whole.tier(num_drafts)
    case = random_round(config, impl, device, batch=len(SLOTS), seed=num_drafts, spoiled=True)
    check_trees(case.offer_all(), SLOTS, CHAIN_ONLY, whole.num_nodes)


@pytest.mark.parametrize("num_nodes", [2, 5, 25])
@pytest.mark.parametrize(("impl", "device"), WHERE)
def test_slots_with_room_for_the_first_nodes_only(impl, device, num_nodes):
    case = random_round(STATIC["published"], impl, device, batch=len(SLOTS), seed=num_nodes)
    check_trees(case.offer_all(), SLOTS, CHAIN_ONLY, num_nodes)


@pytest.mark.parametrize("config", STATIC.values(), ids=STATIC)
@pytest.mark.parametrize(("impl", "device"), WHERE)
def test_static_trees_of_any_shape(impl, device, config):
    case = random_round(config, impl, device, batch=len(SLOTS), seed=5, step=0.5)
    check_trees(case.offer_all(), SLOTS, CHAIN_ONLY, 64)


@pytest.mark.parametrize(("impl", "device"), WHERE)
def test_no_request_with_a_slot_changes_no_slot(impl, device):
    case = random_round(TreeConfig(7, 2, 4), impl, device, ids_dtype=torch.int64).offer_all()
    check_trees(case, [-1, 4, -3], [True] * 4, 8)


@pytest.mark.parametrize("slots", [[2, 0, 1], [0, 1, 2]])
@pytest.mark.parametrize(("impl", "device"), WHERE)
def test_slots_in_any_order(impl, device, slots):
    case = random_round(TreeConfig(7, 2, 4), impl, device, ids_dtype=torch.int64).offer_all()
    check_trees(case, slots, [False, True, False], 8)


@pytest.mark.parametrize(("impl", "device"), WHERE)
def test_a_large_batch(impl, device):
    case = random_round(TreeConfig(31, 3, 6), impl, device, batch=200, step=0.25).offer_all()
    slots = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:200].tolist()
    check_trees(case, slots, [slot % 3 == 0 for slot in range(256)], 32)


@pytest.mark.parametrize("config", [TreeConfig(7, 2, 4), TreeConfig.static([[0], [1], [1, 0]])])
def test_torch_reads_no_value_of_a_round(config):
    """So that a CUDA graph can hold it: tensors of the meta device have no values to wait for."""
    case = random_round(config, "torch", "meta").offer_all()
    buffers, drafts = case.build([0, -1, 2], [True, False, True], 8)
    assert buffers.tokens_RN.is_meta
    assert drafts.is_meta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": 0}, "level=0 is none of which growth holds"),
        ({"level": 3}, "level=3 is none of which growth holds"),
        ({"num_reqs": 6}, "num_reqs must be between 0 and 5"),
        ({"slots_B": torch.zeros(2, dtype=torch.int32)}, "slots_B must be a contiguous vector"),
        ({"chain_only_R": torch.zeros(4)}, "chain_only_R must be torch.bool"),
        ({"draft_tokens_BM": torch.zeros(3, 4, dtype=torch.int64)}, "draft_tokens_BM must be"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    case = random_round(TreeConfig(5, 2, 3), "torch", "cpu").offer_all()
    arguments = {
        "growth": case.growth,
        "level": 2,
        "num_reqs": 3,
        "slots_B": torch.arange(3),
        "chain_only_R": torch.zeros(4, dtype=torch.bool),
        "buffers": TreeBuffers(4, 6, torch.device("cpu")),
        "draft_tokens_BM": torch.zeros(3, 5, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        ops.build_tree(**arguments | change)


@pytest.mark.parametrize(("impl", "device"), WHERE)
@pytest.mark.parametrize("parent", [NO_PARENT, 0])
@pytest.mark.parametrize(
    "config", [TreeConfig(7, 3, 4), STATIC["any order"]], ids=["dynamic", "static"]
)
def test_rows_where_nothing_was_offered_end_too(impl, device, config, parent):
    """Padded rows of a graph are built like all others: no pool may hang a GPU."""
    growth = GrowthBuffers(2, config, torch.device(device))
    growth.parents_BC.fill_(parent)
    buffers = TreeBuffers(2, config.num_nodes, torch.device(device))
    slots = torch.tensor([0, -1], device=device)
    chain_only = torch.zeros(2, dtype=torch.bool, device=device)
    drafts = torch.zeros(2, 7, dtype=torch.int64, device=device)
    ops.build_tree(growth, 3, 2, slots, chain_only, buffers, drafts, impl=impl)
    depths = buffers.depths_RN[0, 1:].tolist()
    assert depths == [1] * 7 if parent == NO_PARENT else max(depths) <= 7
