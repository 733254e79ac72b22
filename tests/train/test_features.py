"""What is taken from a target, and which targets it can be taken from."""

import pytest
import torch
from transformers import LlamaConfig

from tests.train import small
from vllm_eagle3.train.data import epoch_batches
from vllm_eagle3.train.export import checkpoint_config
from vllm_eagle3.train.head_config import rotary_scaling
from vllm_eagle3.train.model import HeadConfig, captured_layers


def test_captured_states_are_the_inputs_of_layers_2_half_and_3_from_the_end() -> None:
    target, head = small.pair(torch.float32)
    assert captured_layers(30) == (2, 15, 27)
    assert captured_layers(7) == (2, 3, 4)
    tokens = next(epoch_batches(small.documents(4), 512, 64, seed=0))
    states = target.model.model(tokens.tokens_BT, output_hidden_states=True).hidden_states
    batch = target.read(tokens, head.draft_token_ids, head.t2d)
    torch.testing.assert_close(batch.features_BTF, torch.cat([states[i] for i in (2, 4, 5)], -1))
    logits = target.model(tokens.tokens_BT).logits
    torch.testing.assert_close(batch.target_logits_BTV, logits[..., head.draft_token_ids])
    assert torch.equal(batch.covered_BT, head.t2d[logits.argmax(-1)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 6}, "at least 7 layers"),
        ({"rope_parameters": {"rope_type": "default"}}, "no rope_theta"),
    ],
)
def test_unsuitable_targets_are_refused(changes: dict, message: str) -> None:
    config = small.llama().config
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        HeadConfig.from_target(config, 64)


def test_a_head_takes_the_base_of_a_scaled_rotary_embedding_and_is_served_without_scaling() -> None:
    config = small.llama(rope_parameters=small.LLAMA3_ROPE).config
    assert rotary_scaling(config) == "llama3"
    assert rotary_scaling(small.llama().config) is None
    head = HeadConfig.from_target(config, 64)
    assert head.rope_theta == 5e5
    written = checkpoint_config(head, "bfloat16")
    served = LlamaConfig.from_dict(written)
    assert rotary_scaling(served) is None
    assert served.rope_parameters["rope_theta"] == 5e5
