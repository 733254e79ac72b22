"""`vllm-eagle3 eval`: from the command line to tables; a tiny pair through vLLM."""

import json

import pytest

from tests.bench.chat import write_tokenizer
from tests.bench.served import end_of_pass, turn
from tests.engine import tiny
from tests.heads import checkpoints
from vllm_eagle3 import cli
from vllm_eagle3.bench import answering, evaluate
from vllm_eagle3.bench.jobs import WorkerError
from vllm_eagle3.bench.prediction import Prediction
from vllm_eagle3.config import TreeConfig


@pytest.fixture
def command(tmp_path):
    """A command line for a head on disk and two questions of the user's own."""
    head = checkpoints.write(tmp_path / "head", checkpoints.flat(), checkpoints.tensors())
    lines = [{"turns": ["one"], "category": "a"}, {"turns": ["x"], "category": "b"}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return (
        f"eval --target somebody/target --head {head} --data {tmp_path / 'mine.jsonl'}"
        f" --output {tmp_path / 'out' / 'r.json'}"
    ).split()


@pytest.fixture
def jobs(monkeypatch):
    """Replaces the engines and the prediction: trees of 60 end half-way."""
    seen = {}

    def run_worker(job, log_path, timeout):
        seen[log_path.stem] = job["engine"]["speculative_config"]
        yield {"event": "ready", "device": "CPU", "vllm": "x", "dtype": "float32"}
        for settings in job["passes"]:
            for number in range(len(settings["conversations"])):
                yield turn(number, [1, 3], temperature=settings["temperature"])
            yield end_of_pass(settings["temperature"])
            if seen[log_path.stem]["num_speculative_tokens"] == 60:
                raise WorkerError("the engine's process ended with exit code 1")

    monkeypatch.setattr(answering, "run_worker", run_worker)
    monkeypatch.setattr(evaluate, "check_plugin", lambda configurations: None)
    monkeypatch.setattr(evaluate, "check_prediction", lambda args: None)
    monkeypatch.setattr(evaluate, "predict", lambda *args: Prediction(error="no torch today"))
    return seen


def test_the_users_own_questions_by_category(tmp_path, command, jobs, capsys):
    assert cli.main([*command, "--no-prediction", "--chain", "3", "--tree", "31/6/8"]) == 0
    assert jobs["tree-31-6-8"]["tree"] == {"depth": 6, "top_k": 8, "verify_budget": None}
    results = json.loads((tmp_path / "out" / "r.json").read_text())
    assert [entry["name"] for entry in results["configurations"]] == ["chain-3", "tree-31-6-8"]
    shown = capsys.readouterr().out
    assert shown.strip() == (tmp_path / "out" / "r.md").read_text().strip()
    for row in ("| mine | 3.00 | - | - | 3.00 |", "| - a | 3.00 |", "Nothing was predicted"):
        assert row in shown
    pytest.importorskip("matplotlib")
    for name in ("depth", "task", "context"):
        assert (tmp_path / "out" / f"r-{name}.png").is_file()


def test_the_tree_is_the_one_that_is_served_unless_told_otherwise(command, jobs):
    assert cli.main([*command, "--no-prediction"]) == 0
    served = TreeConfig.from_dict(True, None)
    drafts, shape = served.num_speculative_tokens, served.to_dict() | {"verify_budget": None}
    assert jobs[f"tree-{drafts}"]["num_speculative_tokens"] == drafts
    assert TreeConfig.from_dict(jobs[f"tree-{drafts}"]["tree"], drafts).to_dict() == shape


@pytest.mark.parametrize("options", [["--tree"], ["--tree", "60", "--no-prediction"]])
def test_what_failed_is_told_and_leaves_the_rest(command, jobs, capsys, options):
    assert cli.main([*command, "--chain", "3", *options]) == 1
    shown = capsys.readouterr().out
    assert ("no torch today" in shown) != ("exit code 1" in shown)
    assert "| mine | 3.00 |" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--head ./none", "--head ./none: no such folder"),
        ("--chain --tree", "nothing to measure"),
        ("--tree 31/6", "as in 31/6/8"),
        ("--chain 64", "num_speculative_tokens=64 is more than a tree can hold"),
        ("--chain 0", "--chain 0: a chain has at least one draft"),
        ("--data mmlu", "none of mt_bench, humaneval, gsm8k"),
        ("--max-tokens 0", "--max-tokens must be at least 1"),
        ("--limit 0", "--limit must be at least 1"),
        ("--limit -1", "--limit must be at least 1"),
        ("--max-model-len 0", "--max-model-len must be at least 1"),
    ],
)
def test_mistakes_end_before_any_engine_starts(command, jobs, capsys, options, message):
    assert cli.main([*command, *options.split()]) == 2
    assert message in capsys.readouterr().err
    assert not jobs


def test_what_cannot_be_predicted_ends_before_any_engine_starts(command, jobs, monkeypatch, capsys):
    def refuse(args):
        raise ValueError(f"nothing can be predicted of {args.target}")

    monkeypatch.setattr(evaluate, "check_prediction", refuse)
    assert cli.main(command) == 2
    assert "nothing can be predicted of somebody/target" in capsys.readouterr().err
    assert not jobs
    assert cli.main([*command, "--no-prediction"]) == 0


@pytest.mark.slow
def test_what_is_predicted_is_what_is_served(tmp_path, command, capsys):
    """A tiny pair through vLLM in float32, with a tree wide enough that drafts are accepted."""
    pair = tiny.write_pair(tmp_path / "pair")
    write_tokenizer(pair.target, tiny.VOCABULARY)
    (tmp_path / "one.jsonl").write_text(json.dumps({"turns": ["x"]}))
    options = f"--target {pair.target} --head {pair.head} --chain --tree 40/2/20"
    options += f" --data {tmp_path / 'one.jsonl'} --max-tokens 11 --max-num-seqs 1"
    options += " --max-model-len 128"
    assert cli.main([*command, *options.split()]) == 0
    results = json.loads((tmp_path / "out" / "r.json").read_text())
    (entry,) = results["configurations"]
    for figures in entry["tasks"] + entry["contexts"]:
        served, predicted = figures["served"], figures["predicted"]
        assert served["rounds"] == predicted["rounds"]
        assert served["tau"] == pytest.approx(predicted["tau_of_text"])
        if figures["temperature"] == 0:  # nothing is left to chance
            assert served["accepted"] == pytest.approx(predicted["accepted"])
            assert predicted["standard_error"] == 0
    taus = [task["served"]["tau"] for task in entry["tasks"]]
    assert len(taus) == 2
    assert min(taus) > 1
    assert "at most 0.0 % off" in capsys.readouterr().out
