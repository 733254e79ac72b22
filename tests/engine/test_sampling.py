"""Sampling with trees: seeded requests repeat plain vLLM's tokens, others its distribution."""

import itertools
from typing import Any

import pytest
import torch

from tests.chi_square import count_pairs, count_tokens, is_drawn_from
from tests.engine import tiny
from tests.engine.engines import Engine, Engines, Tokens, random_prompts, sampling
from tests.engine.oracle import Oracle, draft_tree, put_tree, text_so_far
from vllm_eagle3 import ops
from vllm_eagle3.tree.types import NO_PARENT, GrowthBuffers

SHAPE = {"num_drafts": 10, "depth": 3, "top_k": 3}
PROMPTS = random_prompts(12, seed=21)
NUM_TOKENS = 32
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 8},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.9},
    {"top_k": 30, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 0.0},
    {"logit_bias": {7: 4.0, 100: 4.0, 250: -100.0}},
    {"allowed_token_ids": list(range(0, 512, 3))},
    {"min_tokens": 24, "stop_token_ids": list(range(0, 512, 8))},
    {"temperature": 1.5},
    {"temperature": 0.3},
]


def seeded(index: int, num_tokens: int = NUM_TOKENS) -> Any:
    return sampling(num_tokens, **{"temperature": 0.9, "seed": 100 + index, **FILTERS[index]})


PARAMS = [seeded(index) for index in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def texts(plain: Engine) -> list[Tokens]:
    return plain.generate(PROMPTS, PARAMS)


def knowing(engine: Engine, monkeypatch: Any, texts: list[Tokens], seed: int) -> Oracle:
    oracle = Oracle(engine, monkeypatch, seed)
    oracle.know(PROMPTS, texts)
    return oracle


def test_seeded_requests_in_a_batch(engines, texts, monkeypatch):
    engine = engines.tree(**SHAPE)
    oracle = knowing(engine, monkeypatch, texts, seed=0)
    assert engine.generate(PROMPTS, PARAMS) == texts
    assert oracle.count["moved"] > 40


def test_a_seeded_request_alone(engines, texts, monkeypatch):
    engine = engines.tree(**SHAPE)
    oracle = knowing(engine, monkeypatch, texts, seed=1)
    for index in (0, 5, 9):
        assert engine.generate([PROMPTS[index]], PARAMS[index]) == [texts[index]]
    assert oracle.count["moved"] > 15


def test_seeded_requests_under_preemption(engines, texts, monkeypatch):
    engine = engines.tree(**SHAPE, num_gpu_blocks_override=12)
    oracle = knowing(engine, monkeypatch, texts, seed=2)
    assert engine.generate(PROMPTS, PARAMS) == texts
    assert oracle.count["preempted"] >= 2
    assert oracle.count["moved"] > 40


def test_several_samples_of_a_seeded_prompt(engines, plain, monkeypatch):
    params = sampling(20, temperature=1.0, seed=5, n=3)
    prompts = PROMPTS[:3]
    expected = plain.generate(prompts, params)
    assert len(set(expected)) == 9
    engine = engines.tree(**SHAPE)
    oracle = Oracle(engine, monkeypatch, seed=3)
    oracle.know([prompt for prompt in prompts for _ in range(3)], expected)
    assert engine.generate(prompts, params) == expected
    assert oracle.count["moved"] > 10


def test_noise_keyed_by_row_would_change_seeded_text(engines, texts, monkeypatch):
    """The control: without its depth a node draws with another place's noise."""
    engine = engines.tree(**SHAPE)
    knowing(engine, monkeypatch, texts, seed=0)
    depths_RN = engine.runner.speculator.tree.buffers.depths_RN
    rows_N = torch.arange(depths_RN.shape[1], dtype=depths_RN.dtype)
    verify = engine.runner.rejection_sampler._verify

    def by_row(*args: Any, **kwargs: Any) -> Any:
        true_RN = depths_RN.clone()
        depths_RN.copy_(rows_N)
        try:
            return verify(*args, **kwargs)
        finally:
            depths_RN.copy_(true_RN)

    monkeypatch.setattr(engine.runner.rejection_sampler, "_verify", by_row)
    params = [seeded(index, 12) for index in range(4)]
    assert engine.generate(PROMPTS[:4], params) != [text[:12] for text in texts[:4]]


V = 16
LENGTH = 3
TRIALS = 400
PROMPT = (3, 9, 14, 6)


@pytest.fixture(scope="module")
def small_pair(tmp_path_factory: pytest.TempPathFactory) -> tiny.Pair:
    return tiny.write_pair(tmp_path_factory.mktemp("small"), vocab_size=V, draft_vocab_size=8)


@pytest.fixture(scope="module")
def exact(small_pair: tiny.Pair) -> list[torch.Tensor]:
    """p(first), p(first, second) and p(first, second, third) after the prompt."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(small_pair.target).float().eval()
    joint = [torch.ones(())]
    for length in range(LENGTH):
        texts = [[*PROMPT, *text] for text in itertools.product(range(V), repeat=length)]
        with torch.inference_mode():
            probs = model(torch.tensor(texts)).logits[:, -1].softmax(-1)
        joint.append(joint[-1].unsqueeze(-1) * probs.view(*joint[-1].shape, V))
    return joint[1:]


@pytest.fixture(scope="module")
def small_engines(small_pair: tiny.Pair) -> Engines:
    return Engines(small_pair)


@pytest.fixture
def small_engine(small_engines, exact, monkeypatch) -> Engine:
    """Drafts the target's two favourite tokens, and its favourite after the first of them."""
    engine = small_engines.tree(3, depth=2, top_k=2, max_num_seqs=30)
    speculator, states = engine.runner.speculator, engine.runner.req_states
    publish = speculator._publish

    def favourites(text: Tokens) -> list[int]:
        if not 0 < len(text) < LENGTH:
            return [0, 0]
        return exact[len(text)][text].topk(2).indices.tolist()

    def publish_favourites(growth: GrowthBuffers, reqs: slice, level: int) -> None:
        publish(growth, reqs, level)
        for row, slot in enumerate(speculator.idx_mapping[reqs].tolist(), start=reqs.start):
            if slot < 0:
                continue
            text = text_so_far(states, slot)[len(PROMPT) :]
            best, second = favourites(text)
            tokens = [0, best, second, favourites((*text, best))[0]]
            put_tree(speculator, row, slot, draft_tree([tokens], [[NO_PARENT, 0, 0, 1]]))

    monkeypatch.setattr(speculator, "_publish", publish_favourites)
    return engine


def sample(engine: Engine, trials: int) -> torch.Tensor:
    """[trials, LENGTH] tokens that unseeded requests emit after the prompt."""
    params = sampling(LENGTH, temperature=1.0)
    return torch.tensor(engine.generate([PROMPT] * trials, params))


def is_lossless(tokens: torch.Tensor, exact: list[torch.Tensor]) -> bool:
    first, second, third = tokens.unbind(1)
    one_V, two_VV, three_VVV = exact
    return (
        is_drawn_from(count_tokens(first, V), one_V)
        and is_drawn_from(count_pairs(first, second, V), two_VV)
        and is_drawn_from(count_pairs(second, third, V), three_VVV.sum(0))
        and is_drawn_from(count_pairs(first, third, V), three_VVV.sum(1))
    )


def test_unseeded_requests_keep_the_distribution(small_engine, exact):
    tokens = sample(small_engine, TRIALS)
    accepted = small_engine.metric("spec_decode_num_accepted_tokens")
    assert accepted > TRIALS // 2
    assert is_lossless(tokens, exact)


def test_a_verifier_that_accepts_too_much_is_caught(small_engine, exact, monkeypatch):
    """The control: every third request takes its second draft unseen."""
    verify = ops.verify_tree

    def generous(drawn: Any, drafts: Any, parents: Any, slots: Any, starts: Any, *rest: Any, **kw):
        for request, (start, end) in enumerate(itertools.pairwise(starts.tolist())):
            if request % 3 == 0 and end - start > 2:
                drawn[start] = drafts[start + 2]
        return verify(drawn, drafts, parents, slots, starts, *rest, **kw)

    monkeypatch.setattr(ops, "verify_tree", generous)
    assert not is_lossless(sample(small_engine, TRIALS // 2), exact)
