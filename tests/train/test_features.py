"""What is taken from a target, and which targets it can be taken from."""

import pytest
import torch

from tests.train import small
from vllm_eagle3.train.data import epoch_batches
from vllm_eagle3.train.model import HeadConfig, captured_layers


def test_captured_states_are_the_inputs_of_layers_2_half_and_3_from_the_end() -> None:
    target, head = small.pair(torch.float32)
    assert captured_layers(30) == (2, 15, 27)
    assert captured_layers(7) == (2, 3, 4)
    tokens = next(epoch_batches(small.documents(4), 512, 64, seed=0))
    states = target.model.model(tokens.tokens_BT, output_hidden_states=True).hidden_states
    target._captured.clear()
    batch = target.read(tokens, head.draft_token_ids, head.t2d)
    torch.testing.assert_close(batch.features_BTF, torch.cat([states[i] for i in (2, 4, 5)], -1))
    logits = target.model(tokens.tokens_BT).logits
    torch.testing.assert_close(batch.target_logits_BTV, logits[..., head.draft_token_ids])
    assert torch.equal(batch.covered_BT, head.t2d[logits.argmax(-1)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 6}, "at least 7 layers"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
    ],
)
def test_unsuitable_targets_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadConfig.from_target(small.llama(**changes).config, 64)
