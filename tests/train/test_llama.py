"""The decoder in few operations says what Transformers' does, of the same weights."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.train import small
from vllm_eagle3.train.data import epoch_batches
from vllm_eagle3.train.documents import attend_within_documents
from vllm_eagle3.train.llama import LlamaDecoder
from vllm_eagle3.train.packing import packed_batches

NEAR = {"rtol": 1e-4, "atol": 1e-4}  # sums in another order, through eight layers
SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "as many key heads": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "scaled rotary embedding": {"rope_parameters": small.LLAMA3_ROPE},
    "gelu, wide heads": {"hidden_act": "gelu", "head_dim": 16},
}


def model_of(**changes: Any) -> nn.Module:
    model = small.llama(**changes)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.5, generator=generator)
    attend_within_documents(model)
    return model


def all_states(model: nn.Module, batch: Any) -> tuple[torch.Tensor, ...]:
    output = model.model(
        batch.tokens_BT,
        position_ids=batch.positions_BT,
        documents=batch.layout,
        output_hidden_states=True,
    )
    return *output.hidden_states[:-1], output.last_hidden_state


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_states_are_those_of_the_modules(shape: str, packing: bool) -> None:
    model, given = model_of(**SHAPES[shape]), small.documents(9)
    packed = packed_batches(given, 512, 64, 3, seed=0)
    batch = next(packed if packing else epoch_batches(given, 512, 64, seed=0))
    *before, last = all_states(model, batch)
    hidden_PH, states = LlamaDecoder(model)(batch.tokens_BT, batch.layout, range(8))
    torch.testing.assert_close(hidden_PH, last.flatten(0, 1), **NEAR)
    for layer_id, expected in enumerate(before):
        torch.testing.assert_close(states[layer_id], expected.flatten(0, 1), **NEAR)
    # The modules, whose weights lie side by side now, compute what they did.
    torch.testing.assert_close(all_states(model, batch)[-1], last, **NEAR)


def test_no_weight_is_held_twice() -> None:
    model = model_of()
    before = sum(weight.untyped_storage().nbytes() for weight in model.parameters())
    decoder = LlamaDecoder(model)
    storages = {w.untyped_storage().data_ptr(): w.untyped_storage() for w in model.parameters()}
    assert sum(storage.nbytes() for storage in storages.values()) == before
    tokens = torch.arange(3, 20).unsqueeze(0)
    first, _ = decoder(tokens, None, ())
    with torch.no_grad():
        model.model.layers[4].self_attn.k_proj.weight.mul_(-2)
    second, _ = decoder(tokens, None, ())
    torch.testing.assert_close(second, model.model(tokens).last_hidden_state[0], **NEAR)
    assert (first - second).abs().max() > 0.01
