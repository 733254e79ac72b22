"""Rounds of drafting along a document: where they begin, and how they end."""

import numpy as np
import pytest
import torch

from tests.train import small
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.corpus import Document
from vllm_eagle3.train import node_attention
from vllm_eagle3.train.rounds import Replay

TREE = TreeConfig(60, depth=5, top_k=16, verify_budget=None)


@pytest.fixture(scope="module")
def setup():
    """A pair, and a text that the head drafts well: the target's most likely tokens."""
    target, head = small.pair(torch.float64)
    with torch.no_grad():
        tokens = torch.tensor([[5, 9, 17]])
        for _ in range(40):
            tokens = torch.cat((tokens, target.model(tokens).logits[:, -1:].argmax(-1)), 1)
    return target, head, tokens[0].numpy()


def answered(tokens, answers):
    assistant = np.zeros(len(tokens), dtype=bool)
    for first, last in answers:
        assistant[first:last] = True
    return Document(tokens, assistant)


def rounds(setup, answers, limit=None):
    target, head, tokens = setup
    replay = Replay(target, head, [answered(tokens, answers)])
    return replay.rounds(TREE, (0.0, 1.0), None if limit is None else [limit])[0]


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


CHAIN = TreeConfig(1, depth=1, top_k=1, verify_budget=None)


@pytest.mark.parametrize("rows", [1, 64, 1024])
def test_documents_together_and_in_parts_have_the_rounds_of_each_alone(setup, monkeypatch, rows):
    target, head, tokens = setup
    documents = [
        answered(tokens, [(3, 20), (25, 43)]),
        answered(tokens[:30], [(7, 8)]),
        answered(tokens[4:29], [(9, 25)]),
        answered(tokens[:9], [(2, 9)]),
    ]
    limits = [43, 30, 20, 9]
    alone = [
        Replay(target, head, [document]).rounds(TREE, (0.0, 1.0), [limit])[0]
        for document, limit in zip(documents, limits, strict=True)
    ]
    monkeypatch.setitem(node_attention.MAX_ROWS, "cpu", rows)
    together = Replay(target, head, documents).rounds(TREE, (0.0, 1.0), limits)
    assert together[1] is alone[1] is None
    for one, same in zip(together, alone, strict=True):
        if one is not None:
            assert torch.equal(one.roots_R, same.roots_R)
            assert torch.equal(one.emitted_R, same.emitted_R)
            torch.testing.assert_close(one.exceeds_TRD, same.exceeds_TRD)


def test_the_target_runs_once_over_all_documents_and_never_over_leaves(setup):
    target, head, tokens = setup
    shapes = []

    def note(_module, _args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))

    hook = target.model.model.register_forward_pre_hook(note, with_kwargs=True)
    replay = Replay(target, head, [answered(tokens, [(3, 43)]), answered(tokens, [(9, 43)])])
    assert shapes == [(2, 43)]
    replay.rounds(CHAIN, (1.0,))
    assert len(shapes) == 1
    found = replay.rounds(TREE, (0.0, 1.0))
    hook.remove()
    trees = sum(len(rounds.roots_R) for rounds in found)
    assert sum(rows for rows, _ in shapes[1:]) == trees
    assert 0 < sum(rows * nodes for rows, nodes in shapes[1:]) < trees * TREE.num_nodes / 2
