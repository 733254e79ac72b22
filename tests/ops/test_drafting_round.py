"""From a draft's logits to trees in their slots: all ops of the round together."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.rounds import STATIC, WHERE
from vllm_eagle3 import ops
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.tree.expand import grow, start
from vllm_eagle3.tree.rerank import rerank
from vllm_eagle3.tree.static import StaticTree
from vllm_eagle3.tree.types import DraftTree, GrowthBuffers, TreeBuffers

BATCH, VOCAB = 3, 700


class Drafting:
    """A round whose logits are given, as the engine strings its ops together."""

    def __init__(self, config: TreeConfig, impl: str, device: str, in_one: bool = False) -> None:
        self.config, self.impl, self.in_one = config, impl, in_one
        K = config.top_k
        rows = [BATCH, *(BATCH * K for _ in range(config.depth - 1))]
        self.logits = [torch.zeros(count, VOCAB, device=device) for count in rows]
        self.offsets_V = torch.arange(VOCAB, device=device) * 3
        self.growth = GrowthBuffers(BATCH, config, torch.device(device))
        self.buffers = TreeBuffers(BATCH, config.num_nodes, torch.device(device))
        self.slots_B = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
        self.chain_only_R = torch.zeros(BATCH, dtype=torch.bool, device=device)
        self.root_positions_B = torch.zeros(BATCH, dtype=torch.int64, device=device)
        self.input_ids_M = torch.zeros(BATCH * K, dtype=torch.int32, device=device)
        self.positions_M = torch.zeros(BATCH * K, dtype=torch.int64, device=device)
        self.drafts_BM = torch.zeros(
            BATCH, config.num_speculative_tokens, dtype=torch.int64, device=device
        )

    def draw(self, seed: int) -> None:
        """New logits, at the same addresses; no two of a row are equal."""
        generator = torch.Generator().manual_seed(seed)
        for logits in self.logits:
            scale = 0.5 + torch.rand(logits.shape[0], 1, generator=generator)
            order = torch.rand(logits.shape, generator=generator).argsort(dim=1)
            logits.copy_(order / VOCAB * 20 * scale)

    def run(self) -> None:
        frontier = (self.root_positions_B, 10**6, self.input_ids_M, self.positions_M)
        K, offsets, impl = self.config.top_k, self.offsets_V, {"impl": self.impl}
        for level, logits in enumerate(self.logits, start=1):
            if self.in_one:
                ops.expand_logits(self.growth, logits, offsets, level, BATCH, *frontier, **impl)
            else:
                children = ops.draft_topk(logits, K, offsets, **impl)
                ops.expand_tree(self.growth, *children, level, BATCH, *frontier, **impl)
        ops.build_tree(
            self.growth,
            len(self.logits),
            BATCH,
            self.slots_B,
            self.chain_only_R,
            self.buffers,
            self.drafts_BM,
            impl=self.impl,
        )

    def expected(self) -> DraftTree:
        """The reference, on the log-probabilities that this implementation computes."""
        K = self.config.top_k
        levels = [
            tuple(
                values.cpu().unflatten(0, (BATCH, -1))
                for values in ops.draft_topk(logits, K, self.offsets_V, impl=self.impl)
            )
            for logits in self.logits
        ]
        static = StaticTree.of(self.config)
        first = (values.squeeze(1) for values in levels[0])
        expansion = start(*first, static and static.frontier(1))
        for level, children in enumerate(levels[1:], start=2):
            expansion = grow(expansion, *children, static and static.frontier(level))
        kept_M = static and static.kept(len(levels))
        return rerank(expansion, self.config.num_nodes, kept_M=kept_M)

    def check(self) -> None:
        tree, slots = self.expected(), self.slots_B.tolist()
        for name in ("tokens", "parents", "depths", "ancestor_bits", "scores"):
            found = getattr(self.buffers, f"{name}_RN").cpu()[slots]
            assert torch.equal(found, getattr(tree, f"{name}_BN")), name
        assert torch.equal(self.drafts_BM.cpu(), tree.tokens_BN[:, 1:])


CONFIGS = [
    TreeConfig(31, 6, 8),
    TreeConfig(4, 4, 1),
    TreeConfig(63, 4, 16),
    TreeConfig(5, 1, 5),
    STATIC["published"],
]


@pytest.mark.parametrize("in_one", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("impl", "device"), WHERE)
def test_logits_become_the_reference_trees(impl, device, config, in_one):
    drafting = Drafting(config, impl, device, in_one)
    drafting.draw(seed=1)
    drafting.run()
    drafting.check()


class Launches(TorchDispatchMode):
    """Names of the operations that do more than make a view or allocate, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in func._schema.name:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    ("impl", "device"), [("extension", "cpu"), pytest.param("auto", "cuda", marks=pytest.mark.gpu)]
)
def test_a_round_is_one_operation_a_level_and_one_for_the_trees(impl, device, config):
    """Each costs a launch or two in every step, of static trees, too."""
    drafting = Drafting(config, impl, device, in_one=True)
    with Launches() as launches:
        drafting.run()
    operations = [*["expand_logits"] * config.depth, "build_tree"]
    assert launches.names == [f"vllm_eagle3::{name}" for name in operations]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("config", "impl", "in_one"),
    [
        *itertools.product(CONFIGS, ["torch"], [False]),
        *itertools.product(CONFIGS, ["extension"], [False, True]),
    ],
    ids=str,
)
def test_a_graph_of_the_round_follows_its_inputs(impl, in_one, config):
    """Captured once, replayed on other logits, slots and positions: no wait, no stale state."""
    drafting = Drafting(config, impl, "cuda", in_one)
    drafting.draw(seed=2)
    drafting.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drafting.run()
    for seed in (3, 4, 5):
        drafting.draw(seed)
        drafting.slots_B.copy_(torch.tensor([[0, 1, 2], [1, 2, 0], [2, 1, 0]][seed - 3]))
        drafting.root_positions_B.fill_(seed)
        graph.replay()
        drafting.check()
        last = seed + config.depth - 1
        assert drafting.positions_M.eq(last).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize(("impl", "device"), WHERE)
def test_in_one_equals_one_after_the_other(impl, device, level, dtype):
    """Ties, NaN and rows past the batch included."""
    whole = Drafting(TreeConfig(9, 2, 5), impl, device, in_one=True)
    parts = Drafting(TreeConfig(9, 2, 5), impl, device)
    for drafting in (whole, parts):
        drafting.draw(seed=6)
        for number, logits in enumerate(drafting.logits[:level]):
            logits[0, 3] = float("nan")
            logits[1] = logits[1].round()
            more = torch.cat([logits, logits[:1]]) if drafting is whole else logits
            drafting.logits[number] = more.to(dtype)
        drafting.logits = drafting.logits[:level]
        drafting.run()
    for name, values in vars(parts.growth).items():
        if isinstance(values, torch.Tensor):
            assert torch.equal(getattr(whole.growth, name), values), name
    assert torch.equal(whole.input_ids_M, parts.input_ids_M)
    assert torch.equal(whole.buffers.tokens_RN, parts.buffers.tokens_RN)


def test_too_few_logits_are_refused():
    drafting = Drafting(TreeConfig(9, 2, 5), "torch", "cpu", in_one=True)
    drafting.logits[1] = drafting.logits[1][1:]
    with pytest.raises(ValueError, match="logits_MV must have at least 15 rows, got 14"):
        drafting.run()
