"""Predicted acceptance against brute force: every path drafted and verified by itself."""

import math

import pytest
import torch

from tests.train import small
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.corpus import Document
from vllm_eagle3.train.evaluation import predict
from vllm_eagle3.train.features import Target
from vllm_eagle3.train.model import Eagle3Head

TREE = TreeConfig(20, depth=3, top_k=8, verify_budget=None)
CHAIN = TreeConfig(3, depth=3, top_k=1, verify_budget=None)


def reader(head: Eagle3Head, target: Target):
    return lambda batch: target.read(batch, head.draft_token_ids, head.t2d)


def draft(head: Eagle3Head, target: Target, tokens: list[int], root: int, path: list[int]):
    """Log-probabilities over the target's vocabulary after tokens[..root] and a path."""
    known = torch.tensor([tokens[: root + 1]])
    states = target.model.model(known, output_hidden_states=True).hidden_states
    features = torch.cat([states[i] for i in head.config.aux_layer_ids], -1)[:, :root]
    keys, values = [], []

    def attend(q, k, v):
        keys.append(k)
        values.append(v)
        causal = q.shape[2] > 1 or len(keys) == 1
        return torch.nn.functional.scaled_dot_product_attention(
            q, torch.cat(keys, 2), torch.cat(values, 2), is_causal=causal
        )

    out = head.step(known[:, 1:], head.fuse(features), torch.arange(root)[None], attend)
    for number, token in enumerate(path):
        out = head.step(
            torch.tensor([[token]]),
            head.feedback(out[:, -1:]),
            torch.tensor([[root + number]]),
            attend,
        )
    log_probs = torch.full((small.VOCABULARY,), -math.inf, dtype=out.dtype)
    log_probs[head.draft_token_ids] = head.lm_head(head.norm(out[0, -1])).log_softmax(-1)
    return log_probs


def tree_of_paths(head, target, tokens, root, config: TreeConfig) -> list[list[int]]:
    """The paths from the root to each node of the dynamic tree."""
    pool, frontier = [], [(0.0, [])]
    for _ in range(config.depth):
        offered = []
        for score, path in frontier:
            log_probs, children = draft(head, target, tokens, root, path).topk(config.top_k)
            scored = zip(log_probs.tolist(), children.tolist(), strict=True)
            offered += [(score + gain, [*path, child]) for gain, child in scored]
        pool += offered
        frontier = sorted(offered, key=lambda node: -node[0])[: config.top_k]
    return [path for _, path in sorted(pool, key=lambda n: -n[0])[: config.num_nodes - 1]]


def brute_force(head, target, document: Document, config: TreeConfig) -> dict:
    tokens, assistant = document.tokens.tolist(), document.assistant.tolist()
    roots = emitted = beyond = 0
    accepted = {"T=0": [0.0] * config.depth, "T=1": [0.0] * config.depth}
    for root in range(1, len(tokens) - 1):
        if not (assistant[root] and assistant[root + 1]) or root < beyond:
            continue
        paths = tree_of_paths(head, target, tokens, root, config)
        for path in paths:
            logits = target.model(torch.tensor([tokens[: root + 1] + path])).logits[0, root:-1]
            probs = logits.softmax(-1)[torch.arange(len(path)), torch.tensor(path)]
            greedy = logits.argmax(-1).tolist() == path
            ended = set(path) & set(target.end_token_ids)
            accepted["T=1"][len(path) - 1] += 0.0 if ended else float(probs.prod())
            accepted["T=0"][len(path) - 1] += 0.0 if ended else float(greedy)
        fitting = [len(p) for p in paths if p == tokens[root + 1 : root + 1 + len(p)]]
        # The document's last token has none after it.
        step = min(max(fitting, default=0) + 1, len(tokens) - root - 1)
        emitted += step
        beyond = root + step
        roots += 1
    means = {name: [total / roots for total in sums] for name, sums in accepted.items()}
    return {"roots": roots, "tau_of_text": emitted / roots, "accepted": means}


@pytest.mark.parametrize("config", [TREE, CHAIN], ids=["tree", "chain"])
def test_predicted_acceptance_equals_brute_force(config: TreeConfig) -> None:
    target, head = small.pair(torch.float64)
    document = small.documents(9, longest=24)[7]
    got = predict(head, target, [document], {"it": config}, reader(head, target))["it"]
    with torch.no_grad():
        expected = brute_force(head, target, document, config)
    assert got.roots == expected["roots"] > 1
    assert got.tau_of_text == pytest.approx(expected["tau_of_text"])
    for name, accepted in expected["accepted"].items():
        assert got.accepted[name] == pytest.approx(accepted, rel=1e-4, abs=1e-9)
        assert got.tau[name] == pytest.approx(1 + sum(accepted), rel=1e-4)
    if config is TREE:
        assert got.tau["T=0"] > 1


def test_a_draft_that_ends_the_turn_counts_nothing_and_nothing_counts_below_it() -> None:
    target, head = small.pair(torch.float64)
    document = small.documents(9, longest=24)[7]
    target.model.generation_config.eos_token_id = list(range(0, small.VOCABULARY, 3))
    got = predict(head, target, [document], {"it": TREE}, reader(head, target))["it"]
    with torch.no_grad():
        expected = brute_force(head, target, document, TREE)
    assert got.accepted["T=1"] == pytest.approx(expected["accepted"]["T=1"], rel=1e-4)
    target.model.generation_config.eos_token_id = list(range(small.VOCABULARY))
    got = predict(head, target, [document], {"it": TREE}, reader(head, target))["it"]
    assert got.tau == {"T=0": 1.0, "T=1": 1.0}


def test_documents_without_an_answer_predict_nothing() -> None:
    target, head = small.pair(torch.float32)
    tokens = torch.arange(3, 9).numpy()
    assert (
        predict(head, target, [Document(tokens, tokens < 0)], {"it": TREE}, reader(head, target))
        == {}
    )
