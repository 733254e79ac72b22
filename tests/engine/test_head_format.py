"""vLLM's own chain drafts with an exported head what the trainer's model drafts.

This settles the checkpoint's names, the rotary embedding, the captured layers and the
alignment of tokens, features and positions: a slip in any changes almost every draft.
"""

import inspect
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.engine import tiny
from tests.engine.engines import Engine, chain
from tests.engine.naive_head import write_head
from vllm_eagle3.train.data import TokenBatch
from vllm_eagle3.train.features import Target
from vllm_eagle3.train.model import DraftHead
from vllm_eagle3.train.objectives import OBJECTIVES

NUM_DRAFTS = 4


@torch.no_grad()
def drafts(target: Target, head: DraftHead, tokens: list[int]) -> list[int]:
    """A greedy chain after ``tokens``, whose last is the one just sampled."""
    known = torch.tensor([tokens])
    features = target.read(
        TokenBatch(known[:, :-1], torch.zeros_like(known[:, :-1], dtype=torch.bool)),
        head.draft_token_ids,
        head.t2d,
    ).features_BTF
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys.append(k)
        values.append(v)
        first = len(keys) == 1
        return F.scaled_dot_product_attention(
            q, torch.cat(keys, 2), torch.cat(values, 2), is_causal=first
        )

    length = len(tokens) - 1
    positions = torch.arange(length).unsqueeze(0)
    hidden = head.step(known[:, 1:], head.fuse(features), positions, attend)[:, -1:]
    drafted: list[int] = []
    while True:
        best = head.logits(hidden)[0, 0].argmax()
        drafted.append(int(head.draft_token_ids[best]))
        if len(drafted) == NUM_DRAFTS:
            return drafted
        position = torch.tensor([[length + len(drafted) - 1]])
        token = torch.tensor([drafted[-1:]])
        hidden = head.step(token, head.feedback(hidden), position, attend)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eagle3", "eagle3.1", "eagle3-top", "eagle1"])
def test_vllm_drafts_what_the_trained_model_drafts(name: str, tmp_path: Path) -> None:
    from vllm import SamplingParams

    objective = OBJECTIVES[name]
    pair = tiny.Pair(tiny.write_target(tmp_path / "target"), tmp_path / "head")
    naive = write_head(pair.head, pair.target, objective)
    target, head = naive.target, naive.head
    prompt = tuple(random.Random(3).choices(range(3, tiny.VOCABULARY), k=37))
    proposals = []
    config = chain(pair, NUM_DRAFTS, method=objective.method)
    # Not shut down: that would tear down what vLLM shares between engines of a process.
    engine = Engine(pair, max_num_seqs=1, speculative_config=config)
    speculator = engine.runner.speculator
    propose = speculator.propose

    def recording(*args, **kwargs):
        drafted = propose(*args, **kwargs)
        given = inspect.signature(propose).bind(*args, **kwargs).arguments
        proposals.append((int(given["num_sampled"][0]), drafted[0, :NUM_DRAFTS].tolist()))
        return drafted

    speculator.propose = recording
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, detokenize=False)
    output = engine.generate([prompt], params)[0]
    emitted, seen = 0, set()
    for num_sampled, drafted in proposals:
        emitted += num_sampled
        if num_sampled and emitted <= len(output):
            assert drafted == drafts(target, head, [*prompt, *output[:emitted]])
            seen.update(drafted)
    assert len(seen) > 20  # the head does not draft one token over and over
