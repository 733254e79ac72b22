"""The compiled library: that it loads, what it declares, and what happens without it.

What its operations compute is tested beside their other implementations, in their own files.
"""

import subprocess

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.rounds import STATIC, random_round
from tests.ops.setups import (
    DEVICE,
    cumulative,
    int32,
    int64,
    mixed_batch,
    random_parents,
    random_paths,
    words,
)
from vllm_eagle3 import ops
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.ops import dispatch, extension

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def library(monkeypatch, tmp_path):
    """Where another installation would have its library; there is none."""
    path = tmp_path / "_C.abi3.so"
    monkeypatch.setattr(extension, "LIBRARY", path)
    monkeypatch.setattr(extension, "load", extension.load.__wrapped__)
    return path


class Recorder(TorchDispatchMode):
    """Keeps the arguments of the last call of each compiled operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if namespace == "vllm_eagle3":
            assert not kwargs
            self.calls[name] = args
        return func(*args, **(kwargs or {}))


def a_step(cache: torch.Tensor, tree: TreeConfig) -> None:
    """All operations as one step of the engine calls them."""
    num_slots, num_nodes = 9, 12
    batch = mixed_batch(0, num_slots, num_nodes)
    path_RN, path_len_R, _ = random_paths(0, batch, num_slots, num_nodes)
    path = (path_RN, path_len_R, *batch.rows.values())
    parents = random_parents(1, num_nodes)
    parents_RN = int32(parents).repeat(num_slots, 1)
    rows_T = torch.arange(batch.num_tokens, device=DEVICE)
    lengths_B = torch.full((len(batch.slots),), 99, dtype=torch.int32, device=DEVICE)
    settings = {"impl": "extension"}
    ops.gather_tree_rows(
        int64(words(parents)).repeat(num_slots, 1),
        parents_RN,
        *batch.rows.values(),
        rows_T,
        rows_T.clone(),
        rows_T.clone(),
        lengths_B.clone(),
        lengths_B,
        **settings,
    )
    table = ops.KVCacheTable.from_layers([(cache, 0)])
    ops.compact_kv(table, rows_T.unsqueeze(0), *path, **settings)
    index_T = ops.accepted_row_index(
        *path, batch.num_tokens, token_ids_T=rows_T.clone(), **settings
    )
    states = [torch.randn(batch.num_tokens, 8, device=DEVICE) for _ in range(3)]
    weights = [torch.randn(8, device=DEVICE) for _ in range(3)]
    fused_TF = torch.empty(batch.num_tokens, 24, device=DEVICE)
    ops.fuse_features(states, index_T, weights, 1e-5, fused_TF, **settings)
    tokens_L = torch.zeros(sum(batch.nodes), dtype=torch.int64, device=DEVICE)
    ops.verify_tree(
        tokens_L,
        tokens_L.clone(),
        parents_RN,
        batch.idx_mapping_B,
        batch.cu_num_logits_B1,
        path_RN,
        path_len_R,
        num_nodes=num_nodes,
        **settings,
    )
    growing = random_round(tree, "extension", DEVICE.type)
    growing.offer_all().build([0, 1, 2], [False] * 3, 6)
    frontier = (growing.root_positions_B, 9, growing.input_ids_M, growing.positions_M)
    ops.expand_logits(growing.growth, fused_TF, None, 1, 3, *frontier, **settings)
    ops.draft_topk(fused_TF, 4, torch.arange(24, device=DEVICE), **settings)


@pytest.mark.parametrize(
    "tree", [TreeConfig(5, 3, 4), STATIC["published"]], ids=["dynamic", "static"]
)
def test_each_operation_does_what_its_schema_says(tree):
    """Writes what it says and nothing else, has a fake kernel, and can be traced."""
    cache = torch.zeros(20, 2, 16, 64, device=DEVICE)
    with Recorder() as recorder:
        a_step(cache, tree)
    assert set(recorder.calls) == set(extension.OPS)
    for name, args in recorder.calls.items():
        torch.library.opcheck(getattr(torch.ops.vllm_eagle3, name).default, args)


def test_the_library_has_no_other_operation():
    assert extension.load()
    found = {name for name in torch._C._dispatch_get_all_op_names() if "vllm_eagle3::" in name}
    assert found == {f"vllm_eagle3::{name}" for name in extension.OPS}


def test_a_wrong_tensor_is_refused_below_the_entrances_too():
    run = torch.ops.vllm_eagle3.accepted_row_index
    rows = cumulative([4])
    right = (int32([[0, 1]]), int32([2]), int64([0]), rows, rows, int64([0] * 4), None)
    run(*right)
    for place, wrong in (
        (0, int64([[0, 1]])),
        (1, int32([])),
        (2, int64([0]).float()),
        (3, rows[:1]),
        (4, torch.zeros(4, dtype=torch.int32, device=DEVICE)[::2]),
    ):
        with pytest.raises(RuntimeError, match="accepted_row_index"):
            run(*right[:place], wrong, *right[place + 1 :])


def test_without_it_auto_falls_back_and_its_name_says_how_to_get_it(library):
    assert extension.load() is False
    assert dispatch.resolve("auto", CUDA, ("extension", "triton")) == "triton"
    assert dispatch.resolve("auto", CUDA, ("extension",)) == "torch"
    assert dispatch.resolve("auto", CPU, ("extension", "triton")) == "torch"
    with pytest.raises(ValueError, match="--inplace"):
        dispatch.resolve("extension", CPU, ("extension",))


def test_a_library_that_does_not_load_is_an_error(library):
    library.write_bytes(b"not a library")
    with pytest.raises(RuntimeError, match="--inplace"):
        dispatch.resolve("auto", CUDA, ("extension", "triton"))


def test_a_library_of_other_sources_is_an_error(monkeypatch):
    monkeypatch.setattr(extension, "OPS", (*extension.OPS, "an_op_to_come"))
    with pytest.raises(RuntimeError, match="an_op_to_come"):
        extension.load.__wrapped__()


def test_it_loads_under_any_torch_and_any_python():
    """A torch without CUDA has neither libcudart nor libtorch_cuda; Pythons differ in symbols."""
    command = ["readelf", "--wide", "--dynamic", "--dyn-syms", extension.LIBRARY]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].rstrip("]") for line in listed.splitlines() if "NEEDED" in line}
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "cuda" in name or "python" in name]
    undefined = {line.split()[-1] for line in listed.splitlines() if " UND " in line}
    assert not [name for name in undefined if name.startswith(("Py", "_Py", "cuda"))]
