"""Rounds of drafting along a document: where they begin, and how they end."""

import pytest
import torch

from tests.train import small
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.train.data import TokenBatch
from vllm_eagle3.train.drafting import DocumentDrafter
from vllm_eagle3.train.rounds import rounds_of_document

TREE = TreeConfig(60, depth=5, top_k=16, verify_budget=None)


@pytest.fixture(scope="module")
def setup():
    """A pair, and a text that the head drafts well: the target's most likely tokens."""
    target, head = small.pair(torch.float64)
    with torch.no_grad():
        tokens = torch.tensor([[5, 9, 17]])
        for _ in range(40):
            tokens = torch.cat((tokens, target.model(tokens).logits[:, -1:].argmax(-1)), 1)
        batch = TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool))
        features = target.read(batch, head.draft_token_ids, head.t2d).features_BTF[0]
        return target, DocumentDrafter(head, tokens[0], features)


def rounds(setup, answers, limit=None):
    target, drafter = setup
    assistant = torch.zeros(len(drafter.tokens_T), dtype=torch.bool)
    for first, last in answers:
        assistant[first:last] = True
    return rounds_of_document(target, drafter, assistant, TREE, (0.0, 1.0), limit)


def test_rounds_emit_every_token_but_the_first_of_each_turn(setup):
    both = rounds(setup, [(3, 20), (25, 43)])
    starts, emitted = both.roots_R.tolist(), both.emitted_R.tolist()
    assert starts[0] == 3
    assert 25 in starts
    assert sum(emitted) == (20 - 3 - 1) + (43 - 25 - 1)
    assert max(emitted) > 1
    for start, count in zip(starts, emitted, strict=True):
        assert start + count in [*starts, 19, 42]


def test_greedy_text_is_emitted_as_greedy_decoding_is_predicted(setup):
    """Until the limit, which only the prediction has to be told."""
    answer = rounds(setup, [(3, 43)], limit=43)
    assert answer.emitted_R.tolist() == (1 + answer.exceeds_TRD[0.0].sum(1)).tolist()
    unlimited = rounds(setup, [(3, 43)])
    for temperature, exceeds in answer.exceeds_TRD.items():
        inside = answer.roots_R.unsqueeze(1) + torch.arange(1, 6) + 1 < 43
        expected = unlimited.exceeds_TRD[temperature].masked_fill(~inside, 0.0)
        torch.testing.assert_close(exceeds, expected)


def test_an_answer_of_one_token_has_no_round(setup):
    assert rounds(setup, [(7, 8)]) is None
    assert rounds(setup, []) is None
