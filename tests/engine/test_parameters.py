"""Parameters that look at the text before a token, and what else a request may ask for.

Penalties, bad words and grammars get a chain of drafts, because vLLM computes them as if the
rows of a request were one text; requests beside them keep their trees.
"""

import json
from typing import Any

import pytest

from tests.engine.engines import Engine, Engines, Tokens, random_prompts, sampling
from tests.engine.oracle import Oracle
from vllm_eagle3.engine import model_state
from vllm_eagle3.tree.types import NO_PARENT

SHAPE = {"num_drafts": 10, "depth": 3, "top_k": 3}
NUM_TOKENS = 32
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


def requests() -> list[tuple[Tokens, Any]]:
    """Prompts and parameters, every second request with plain greedy sampling."""
    from vllm.sampling_params import StructuredOutputsParams

    special: list[dict[str, Any]] = [
        {"repetition_penalty": 1.4},
        {"presence_penalty": 1.5, "frequency_penalty": 0.8},
        {"bad_words": ["th", "e", "ing", "q"], "detokenize": True},
        {"structured_outputs": StructuredOutputsParams(json=SCHEMA), "ignore_eos": False},
        {"structured_outputs": StructuredOutputsParams(choice=["chain", "tree"])},
        {"repetition_penalty": 1.2, "temperature": 0.9, "seed": 11},
    ]
    params = []
    for settings in special:
        params += [sampling(NUM_TOKENS, **settings), sampling(NUM_TOKENS)]
    return list(zip(random_prompts(len(params), seed=31), params, strict=True))


@pytest.fixture(scope="module")
def plain_text(engines: Engines) -> Engine:
    """Plain vLLM with a tokenizer, which grammars and bad words need."""
    return engines.get(skip_tokenizer_init=False, max_num_seqs=12)


def accepting_chains(engine: Engine, monkeypatch: Any) -> set[int]:
    """Slots whose request is drafted a chain and has had a draft accepted; fills as it runs."""
    tree, slots = engine.runner.speculator.tree, set[int]()
    commit = engine.runner.speculator._commit

    def look(batch: Any, *args: Any) -> Any:
        for slot in batch.idx_mapping_np[batch.num_draft_tokens_per_req > 0].tolist():
            parents = tree.buffers.parents_RN[slot].tolist()
            if tree.chain_only_R[slot]:
                drafted = next((i for i in range(1, 11) if parents[i] == NO_PARENT), 11)
                assert parents[:drafted] == list(range(NO_PARENT, drafted - 1))
                if tree.buffers.path_len_R[slot] > 1:
                    slots.add(slot)
        return commit(batch, *args)

    monkeypatch.setattr(engine.runner.speculator, "_commit", look)
    return slots


def test_chains_and_trees_in_one_batch(engines, plain_text, monkeypatch):
    prompts, params = zip(*requests(), strict=True)
    expected = plain_text.generate(prompts, params)
    engine = engines.tree(**SHAPE, skip_tokenizer_init=False, max_num_seqs=12)
    oracle = Oracle(engine, monkeypatch)
    oracle.know(prompts, expected)
    accepting = accepting_chains(engine, monkeypatch)
    outputs = engine.generate(prompts, params)
    assert outputs == expected
    # Drafts of chains are accepted, too.
    assert len(accepting) >= 4
    assert oracle.count["moved"] > 10
    tokenizer = engine.llm.get_tokenizer()
    answer = tokenizer.decode(outputs[8], skip_special_tokens=True)
    assert answer.startswith(("chain", "tree"))


def test_penalties_on_a_tree_would_change_the_text(engines, plain_text, monkeypatch):
    """The control: what makes the chain necessary."""
    prompts, params = zip(*requests()[:4], strict=True)
    expected = plain_text.generate(prompts, params)
    engine = engines.tree(**SHAPE, skip_tokenizer_init=False, max_num_seqs=12)
    Oracle(engine, monkeypatch).know(prompts, expected)
    monkeypatch.setattr(model_state, "needs_chain", lambda params: False)
    outputs = engine.generate(prompts, params)
    assert outputs[0] != expected[0] or outputs[2] != expected[2]
    assert (outputs[1], outputs[3]) == (expected[1], expected[3])


def test_a_grammar_is_kept(engines, monkeypatch):
    """Wrong drafts beside a grammar: every emitted prefix obeys it."""
    from vllm.sampling_params import StructuredOutputsParams

    params = sampling(
        60,
        structured_outputs=StructuredOutputsParams(regex=r'\{"n": [0-9]{2}\}'),
        ignore_eos=False,
        detokenize=True,
    )
    engine = engines.tree(**SHAPE, skip_tokenizer_init=False, max_num_seqs=12)
    for output in engine.outputs(random_prompts(3, seed=32), params):
        assert set(json.loads(output.outputs[0].text)) == {"n"}


def test_logprobs(engines, plain, monkeypatch):
    prompts = random_prompts(4, seed=33)
    params = sampling(NUM_TOKENS, logprobs=3, prompt_logprobs=2)
    expected = plain.outputs(prompts, params)
    engine = engines.tree(**SHAPE)
    oracle = Oracle(engine, monkeypatch, seed=4)
    oracle.know(prompts, [output.outputs[0].token_ids for output in expected])
    outputs = engine.outputs(prompts, params)
    assert oracle.count["moved"] > 10
    for output, reference in zip(outputs, expected, strict=True):
        same(output.outputs[0].logprobs, reference.outputs[0].logprobs)
        same(output.prompt_logprobs[1:], reference.prompt_logprobs[1:])


def same(logprobs: Any, reference: Any) -> None:
    """The same tokens in the same order of rank, with the same values up to rounding."""
    assert len(logprobs) == len(reference)
    for place, expected in zip(logprobs, reference, strict=True):
        assert list(place) == list(expected)
        for token, entry in expected.items():
            assert place[token].rank == entry.rank
            assert place[token].logprob == pytest.approx(entry.logprob, abs=1e-3)
