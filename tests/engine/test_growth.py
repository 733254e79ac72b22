"""The tree that the engine drafts is the one that EAGLE-2 describes.

Accepted lengths, but no output, would show a draft that reads wrong positions or a wrong
cache. Two oracles: vLLM's own chain, which a tree of one child a node must equal draft by
draft, and the head recomputed without any cache.
"""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engine import tiny
from tests.engine.engines import Engine, Engines, Tokens, chain, random_prompts, sampling
from tests.engine.oracle import Oracle, text_so_far
from tests.tree import naive
from vllm_eagle3.train.model import Eagle3Head, HeadConfig
from vllm_eagle3.tree.rerank import rerank

DEPTH = 5
NUM_TOKENS = 24
PROMPTS = random_prompts(8, seed=3)


@pytest.fixture(scope="module")
def texts(plain: Engine) -> list[Tokens]:
    return plain.generate(PROMPTS, sampling(NUM_TOKENS))


def drafts_of_the_chain(engine: Engine, monkeypatch: Any) -> dict[Tokens, Tokens]:
    """vLLM's drafts after each text, filled as the engine runs."""
    drafts: dict[Tokens, Tokens] = {}
    speculator, states = engine.runner.speculator, engine.runner.req_states
    propose = speculator.propose

    def recording(batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = propose(batch, *args, **kwargs)
        if not kwargs.get("dummy_run"):
            for slot, row in zip(batch.idx_mapping_np.tolist(), tokens.tolist(), strict=True):
                drafts[text_so_far(states, slot)] = tuple(row)
        return tokens

    monkeypatch.setattr(speculator, "propose", recording)
    return drafts


@pytest.fixture(scope="module")
def stock_drafts(engines: Engines, pair: tiny.Pair, texts: list[Tokens]) -> dict[Tokens, Tokens]:
    engine = engines.get(speculative_config=chain(pair, DEPTH))
    with pytest.MonkeyPatch.context() as monkeypatch:
        drafts = drafts_of_the_chain(engine, monkeypatch)
        assert engine.generate(PROMPTS, sampling(NUM_TOKENS)) == texts
    return drafts


def test_one_child_a_node_is_vllms_chain(engines, texts, stock_drafts, monkeypatch):
    engine = engines.tree(DEPTH, depth=DEPTH, top_k=1)
    oracle = Oracle(engine, monkeypatch)
    oracle.know(PROMPTS, texts)
    assert engine.generate(PROMPTS, sampling(NUM_TOKENS)) == texts
    # Deep accepts, so that the draft also grows from caches that compaction has filled.
    assert oracle.count["accepted"] > 60
    assert oracle.count["moved"] > 15
    compared = 0
    for text, fields in oracle.drafted.items():
        if text in stock_drafts:
            assert tuple(fields["tokens_BN"][1:].tolist()) == stock_drafts[text]
            assert fields["parents_BN"].tolist() == list(range(-1, DEPTH))
            compared += 1
    assert compared > 40


def test_the_best_first_token_is_vllms_first_draft(engines, texts, stock_drafts, monkeypatch):
    engine = engines.tree(12, depth=3, top_k=4)
    oracle = Oracle(engine, monkeypatch, seed=1)
    oracle.know(PROMPTS, texts)
    assert engine.generate(PROMPTS, sampling(NUM_TOKENS)) == texts
    compared = [text for text in oracle.drafted if text in stock_drafts]
    assert len(compared) > 30
    for text in compared:
        assert int(oracle.drafted[text]["tokens_BN"][1]) == stock_drafts[text][0]


class NaiveHead:
    """The head without a cache: the whole text and path again for every node."""

    def __init__(self, pair: tiny.Pair) -> None:
        from transformers import LlamaForCausalLM

        self.target = LlamaForCausalLM.from_pretrained(pair.target).float().eval()
        tensors = load_file(pair.head / "model.safetensors")
        config = HeadConfig.from_target(self.target.config, len(tensors["d2t"]))
        ids = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
        self.head = Eagle3Head(config, self.target.get_input_embeddings().weight, ids)
        self.head.load_state_dict(tensors)

    @torch.inference_mode()
    def log_probs(self, text: Tokens, path: Tokens) -> torch.Tensor:
        """Over the target's vocabulary, of the token that follows ``text + path``."""
        hidden = self.target(torch.tensor([text]), output_hidden_states=True).hidden_states
        captured = torch.cat([hidden[i] for i in self.head.config.aux_layer_ids], dim=-1)
        # Slot p takes the state of token p and the embedding of token p + 1.
        states = self.head.fuse(captured[:, :-1])
        tokens = text[1:]
        out = self._run(tokens, states)
        for token in path:
            tokens, states = (*tokens, token), torch.cat([states, out[:, -1:]], dim=1)
            out = self._run(tokens, states)
        logits_V = self.head.lm_head(self.head.norm(out))[0, -1]
        log_probs = torch.full((self.head.config.vocab_size,), -torch.inf)
        log_probs[self.head.draft_token_ids] = logits_V.log_softmax(-1)
        return log_probs

    def _run(self, tokens: Tokens, states: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(len(tokens))[None]
        return self.head.step(torch.tensor([tokens]), states, positions, _causal)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def naive_tree(head: NaiveHead, text: Tokens, depth: int, top_k: int, num_nodes: int) -> Any:
    """EAGLE-2's tree below the last token of a text, one node at a time."""
    first = head.log_probs(text, ()).topk(top_k)
    levels = [(first.values[None], first.indices[None])]
    pool: list[Tokens] = [(int(token),) for token in first.indices]
    for _ in range(depth - 1):
        expansion = naive.expand(levels)
        paths = [pool[i] for i in expansion.frontier_index_BK[0].tolist()]
        best = [head.log_probs(text, path).topk(top_k) for path in paths]
        levels.append(
            (
                torch.stack([b.values for b in best])[None],
                torch.stack([b.indices for b in best])[None],
            )
        )
        pool += [
            (*path, int(token)) for path, b in zip(paths, best, strict=True) for token in b.indices
        ]
    return rerank(naive.expand(levels), num_nodes)


@pytest.mark.parametrize(
    ("num_drafts", "depth", "top_k", "budget"),
    # With 70 rows the draft grows the trees of eight requests in two groups.
    [(20, 4, 3, 1024), (63, 5, 8, 1024), (3, 2, 2, 1024), (4, 1, 6, 1024), (31, 4, 14, 70)],
)
def test_growth_equals_a_head_without_a_cache(
    engines, pair, texts, monkeypatch, num_drafts, depth, top_k, budget
):
    engine = engines.tree(num_drafts, depth, top_k, max_num_batched_tokens=budget)
    oracle = Oracle(engine, monkeypatch, seed=num_drafts)
    oracle.know(PROMPTS, texts)
    short = 16
    assert engine.generate(PROMPTS, sampling(short)) == [text[:short] for text in texts]
    assert oracle.count["accepted"] > 20
    head = NaiveHead(pair)
    drawn = [text for text in oracle.drafted if text][:: max(1, len(oracle.drafted) // 6)]
    assert len(drawn) >= 5
    for text in drawn:
        expected = naive_tree(head, text, depth, top_k, num_drafts + 1)
        fields = oracle.drafted[text]
        assert torch.equal(fields["tokens_BN"][1:], expected.tokens_BN[0, 1:])
        assert torch.equal(fields["parents_BN"], expected.parents_BN[0])
        assert torch.equal(fields["depths_BN"], expected.depths_BN[0])
        torch.testing.assert_close(fields["scores_BN"], expected.scores_BN[0], rtol=1e-4, atol=1e-4)


def test_trees_grown_in_groups_are_those_grown_at_once(engines, plain):
    texts = plain.generate(PROMPTS, sampling(12))
    drafted = []
    # 70 rows hold the frontiers of five of the eight requests.
    for budget in (1024, 70):
        engine = engines.tree(4, 3, 14, max_num_batched_tokens=budget)
        with pytest.MonkeyPatch.context() as patch:
            # It knows no text, so that both engines draft after every token.
            oracle = Oracle(engine, patch)
            assert engine.generate(PROMPTS, sampling(12)) == texts
        drafted.append(oracle.drafted)
    at_once, in_groups = drafted
    common = [text for text in in_groups if text and text in at_once]
    assert len(common) > 80
    for text in common:
        for name, value in at_once[text].items():
            torch.testing.assert_close(in_groups[text][name], value, rtol=1e-4, atol=1e-4)
