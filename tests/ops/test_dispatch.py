"""Which implementation runs where, and that kernels never wait for the device."""

import pytest
import torch

from tests.ops.setups import DEVICE, Attention, mixed_batch, random_parents, random_paths, words
from vllm_eagle3 import ops
from vllm_eagle3.ops import dispatch


def test_auto_is_the_first_kernel_on_a_gpu_and_torch_elsewhere():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for kernels in (("triton",), ("extension", "triton"), ("extension",)):
        assert dispatch.resolve("auto", cuda, kernels) == kernels[0]
        assert dispatch.resolve("auto", cpu, kernels) == "torch"
    assert dispatch.resolve("auto", cuda, ()) == "torch"


def test_triton_without_a_gpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    assert dispatch.resolve("triton", torch.device("cuda")) == "triton"
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        dispatch.resolve("triton", torch.device("cpu"))


def test_an_unknown_implementation_is_refused():
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="impl must be"):
        dispatch.resolve("cuda", cpu, ("extension", "triton"))
    with pytest.raises(ValueError, match='one of "auto", "torch", "triton", got'):
        dispatch.resolve("extension", cpu, ("triton",))


def test_tensors_of_two_devices_are_named():
    with pytest.raises(ValueError, match="a on cpu, b on meta"):
        dispatch.check_same_device(a=torch.empty(1), b=torch.empty(1, device="meta"))


@pytest.mark.gpu
def test_no_operation_waits_for_the_gpu_and_all_can_be_captured():
    num_slots, num_nodes = 9, 12
    batch = mixed_batch(0, num_slots, num_nodes)
    rows = batch.rows
    path_RN, path_len_R, _ = random_paths(0, batch, num_slots, num_nodes)
    parents = torch.tensor(random_parents(1, num_nodes), dtype=torch.int32, device=DEVICE)
    parents_RN = parents.repeat(num_slots, 1)
    bits_RN = torch.tensor(words(parents.tolist()), device=DEVICE).repeat(num_slots, 1)
    linear_T = torch.arange(batch.num_tokens, device=DEVICE)
    seq_lens_B = torch.full((len(batch.slots),), 99, dtype=torch.int32, device=DEVICE)
    tokens_L = torch.zeros(sum(batch.nodes), dtype=torch.int64, device=DEVICE)
    table = ops.KVCacheTable.from_layers([(torch.zeros(20, 2, 16, 64, device=DEVICE), 0)])
    case = Attention([5, 20], [words([-1, 0]), words([-1, 0, 0])])
    out = torch.empty_like(case.inputs["query_THD"])
    lse = torch.zeros(case.heads, out.shape[0], device=DEVICE)
    in_cache = ("key_cache", "value_cache", "block_table_BP", "prefix_lens_B")
    in_tree = {name: value for name, value in case.inputs.items() if name not in in_cache}
    settings = case.settings

    token_ids_T, states = linear_T.clone(), torch.randn(batch.num_tokens, 8, device=DEVICE)
    fused = torch.zeros(batch.num_tokens, 24, device=DEVICE)

    def run_all() -> None:
        ops.gather_tree_rows(
            bits_RN,
            torch.zeros_like(parents_RN),
            **rows,
            linear_positions_T=linear_T,
            out_bits_T=torch.empty_like(linear_T),
            out_positions_T=torch.empty_like(linear_T),
            out_prefix_lens_B=torch.empty_like(seq_lens_B),
            seq_lens_B=seq_lens_B,
        )
        slots, logits = rows["idx_mapping_B"], rows["cu_num_logits_B1"]
        state = (parents_RN, slots, logits, path_RN, path_len_R)
        ops.verify_tree(tokens_L, tokens_L, *state, num_nodes=num_nodes)
        index_T = ops.accepted_row_index(
            path_RN, path_len_R, **rows, num_tokens=batch.num_tokens, token_ids_T=token_ids_T
        )
        ops.fuse_features([states] * 3, index_T, [], 1e-5, fused)
        ops.compact_kv(table, linear_T.unsqueeze(0), path_RN, path_len_R, **rows)
        ops.tree_attention(**case.inputs, out_THD=out, **settings)
        ops.finish_tree_attention(**in_tree, out_THD=out, lse_HT=lse, **settings)
        ops.draft_topk(out.flatten(1), 4)

    run_all()  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_all()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = fused.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all()
    fused.zero_()
    graph.replay()
    assert torch.equal(fused, expected)
