"""The offline prediction's own process, beside steps found by brute force."""

import argparse
import json

import pytest
import torch

from tests.bench.served import run_of, turn
from tests.train import brute, small
from vllm_eagle3.bench import prediction, predictor
from vllm_eagle3.bench.configurations import chain, parse_tree
from vllm_eagle3.bench.prediction import _job, predict
from vllm_eagle3.bench.rounds import served_rounds
from vllm_eagle3.train.export import export

PROMPT = [5, 9, 17, 40]
WAYS = [chain(3), parse_tree("60/3/16", one_size=True)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A small pair in memory, and the options that name the same pair on disk."""
    folder = tmp_path_factory.mktemp("pair")
    target, head = small.pair(torch.float32)
    target.model.save_pretrained(folder / "target")
    # What the export folds into `fc` is not in float32 what it was: compare what is on disk.
    head.fc.weight.data.mul_(head.feature_scale_F)
    head.feature_scale_F.fill_(1.0)
    export(head, folder / "head", dtype="float32")
    args = argparse.Namespace(
        target=str(folder / "target"),
        head=str(folder / "head"),
        max_tokens=16,
        max_model_len=256,
        prediction_timeout=120,
    )
    return target, head, args


@pytest.fixture(scope="module")
def answered(pair):
    """By temperature, a text by the target as a server emits it with each way of drafting."""
    return {temperature: list(_answered(*pair[:2], temperature)) for temperature in (0.0, 1.0)}


def _answered(target, head, temperature):
    torch.manual_seed(0)
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(16):
            logits = target.model(torch.tensor([tokens])).logits[0, -1]
            probs = logits.softmax(-1) if temperature else logits == logits.max()
            tokens.append(int(probs.float().multinomial(1)))
    for configuration in WAYS:
        steps = brute.steps_of_text(head, target, tokens, len(PROMPT), configuration.as_tree)
        answer = {"prompt": PROMPT, "tokens": tokens[len(PROMPT) :], "temperature": temperature}
        yield turn(0, [1, *steps], **answer)


def test_rounds_are_those_of_a_server(pair, answered, tmp_path):
    runs = [run_of(*turns) for turns in zip(*answered.values(), strict=True)]
    found = predict(pair[2], WAYS, runs, tmp_path / "log")
    assert found.error is None
    longer = 0
    for configuration, run in zip(WAYS, runs, strict=True):
        for key, answer in run.turns.items():
            rounds = found.rounds[configuration.name, key]
            served = served_rounds(len(PROMPT), answer["steps"])
            assert [(r.context, r.tokens) for r in rounds] == served
            if key[1] == 0:
                assert [1 + sum(r.exceeds) for r in rounds] == [r.tokens for r in served]
            longer += sum(r.tokens > 1 for r in served)
    assert longer >= 5


def replayed(job):
    events = []
    predictor.run(job, events.append)
    return events


def test_an_answer_is_read_once_for_all_ways_of_drafting(pair, answered):
    job, keys = _job(pair[2], WAYS, [run_of(answer) for answer in answered[0.0]])
    (answer,) = job["answers"]
    assert [(wanted["drafts"], wanted["tree"]) for wanted in answer["wanted"]] == [
        (3, {"depth": 3, "top_k": 1, "verify_budget": None}),
        (60, {"depth": 3, "top_k": 16, "verify_budget": None}),
    ]
    assert keys == [[("chain-3", ("mine", 0.0, 0, 0)), ("tree-60-3-16", ("mine", 0.0, 0, 0))]]
    kinds = [event["event"] for event in replayed(job)]
    assert kinds == ["ready", "rounds", "rounds", "done"]


def test_answers_that_want_the_same_are_replayed_together_as_each_alone(pair, answered):
    greedy, drawn = answered[0.0][0], answered[1.0][0]
    shorter = greedy | {"number": 1, "tokens": greedy["tokens"][:7]}
    other = drawn | {"number": 1, "tokens": drawn["tokens"][:9]}
    job, _ = _job(pair[2], WAYS, [run_of(greedy, shorter, drawn), run_of(greedy, drawn, other)])
    wanted = [json.dumps(answer["wanted"]) for answer in job["answers"]]
    assert len(wanted) == 4
    assert len(set(wanted)) >= 3
    together = {
        (event["answer"], event["wanted"]): event for event in replayed(job) if "wanted" in event
    }
    for number, answer in enumerate(job["answers"]):
        alone = [event for event in replayed(job | {"answers": [answer]}) if "wanted" in event]
        assert len(alone) == len(answer["wanted"])
        for event in alone:
            same = together.pop((number, event["wanted"]))
            assert (same["contexts"], same["tokens"]) == (event["contexts"], event["tokens"])
            for row, expected in zip(same["exceeds"], event["exceeds"], strict=True):
                assert row == pytest.approx(expected, abs=2e-6)
    assert not together


def test_an_end_token_that_only_the_server_knows_ends_drafts_too(pair, answered):
    """Its answers tell: the last token of one that was not cut is such a token."""
    answer = answered[1.0][1]
    likely = [answer["tokens"][at] for at in range(1, 16)]

    def expected(*stopped):
        extra = [turn(n, [1], tokens=[t], finish_reason="stop") for n, t in enumerate(stopped, 1)]
        job, keys = _job(pair[2], WAYS[1:], [run_of(answer, *extra)])
        assert job["end_token_ids"] == sorted(set(stopped))
        assert len(keys) == 1 + len(extra)
        (event,) = [e for e in replayed(job) if e["event"] == "rounds"]
        return sum(map(sum, event["exceeds"]))

    assert expected(*sorted(set(likely))) < expected()


def test_an_answer_that_stopped_could_have_gone_on_to_the_limit(pair):
    def limit(**changes):
        (found,) = _job(pair[2], WAYS[:1], [run_of(turn(0, [1, 2], **changes))])[0]["answers"]
        return found["limit"]

    assert limit() == 10 + 3
    assert limit(finish_reason="stop") == 10 + 16
    assert limit(finish_reason="stop", prompt=list(range(250))) == 256


def test_what_cannot_be_replayed_is_told(pair, tmp_path, monkeypatch):
    run = run_of(turn(0, [1, 2]))
    job, _ = _job(pair[2], WAYS[:1], [run])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (event,) = replayed(job | {"target": str(tmp_path)})
    assert event["event"] == "refused"
    assert "of type 'qwen2'" in event["reason"]
    hurried = argparse.Namespace(**vars(pair[2]) | {"prediction_timeout": 0.01})
    assert "took longer" in predict(hurried, WAYS[:1], [run], tmp_path / "log").error
    assert predict(pair[2], WAYS[:1], [run_of()], tmp_path / "log").error == "there are no answers"
    monkeypatch.setattr(prediction.WorkerProcess, "events", lambda self: iter([event]))
    assert predict(pair[2], WAYS[:1], [run], tmp_path / "log").error == event["reason"]
