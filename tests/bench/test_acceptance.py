import argparse
import json

import pytest

from tests.bench.chat import write_tokenizer
from tests.engine import tiny
from vllm_eagle3.bench import acceptance, answering
from vllm_eagle3.bench.jobs import WorkerError


def parse(tmp_path, *options):
    parser = argparse.ArgumentParser()
    acceptance.add_arguments(parser)
    fixed = ["--target", "target", "--head", "o/head", "--output", str(tmp_path / "out" / "r.json")]
    return parser.parse_args([*fixed, *options])


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"turns": ["one", "two"]}) + "\n" + json.dumps({"turns": ["x"]}))
    return str(path)


@pytest.fixture
def jobs(monkeypatch):
    """Replaces the engines: drafts arrive three at a time, and trees of 8 fail half-way."""
    seen = {}

    def run_worker(job, log_path, timeout):
        seen[log_path.stem] = job
        drafts = (job["engine"]["speculative_config"] or {}).get("num_speculative_tokens", 0)
        yield {"event": "ready", "vllm": "x"}
        for settings in job["passes"]:
            if drafts == 8 and settings["temperature"] == 1.0:
                raise WorkerError("the engine's process ended with exit code 1")
            for conversation in settings["conversations"]:
                for turn in range(len(conversation["turns"])):
                    yield {
                        "event": "turn",
                        "dataset": conversation["dataset"],
                        "number": conversation["number"],
                        "turn": turn,
                        "temperature": settings["temperature"],
                        "tokens": [1, 2, 3, 4],
                        "steps": [1, 3] if drafts else [1, 1, 1, 1],
                    }
            counters = {"drafts": 3, "draft_tokens": 3 * drafts, "accepted_tokens": 6}
            temperature = settings["temperature"]
            yield {
                "event": "pass",
                "temperature": temperature,
                "seconds": 1,
                "counters": counters,
            }
        yield {"event": "done"}

    monkeypatch.setattr(answering, "run_worker", run_worker)
    monkeypatch.setattr(acceptance, "check_plugin", lambda configurations: None)
    return seen


def test_one_failed_configuration_leaves_the_others(tmp_path, questions, jobs, capsys):
    args = parse(tmp_path, "--data", questions, "--chain", "3", "--tree", "8", "16", "--jobs", "2")
    assert acceptance.run(args) == 1
    results = json.loads(args.output.read_text())
    names = [entry["name"] for entry in results["configurations"]]
    assert names == ["plain", "chain-3", "tree-8", "tree-16"]
    plain, chain, broken, tree = results["configurations"]
    assert [c["tau"] for c in plain["cells"]] == [1.0, 1.0]
    assert [c["tau"] for c in chain["cells"]] == [3.0, 3.0]
    assert tree["cells"][0]["identity"] == {"compared": 3, "identical": 3, "divergences": []}
    assert "exit code 1" in broken["error"]
    assert [c["temperature"] for c in broken["cells"]] == [0.0]
    shown = capsys.readouterr()
    assert "| tree, 8 drafts (depth 5, top-k 8, fixed size) | 3.00 | failed |" in shown.out
    assert shown.out.strip() == args.output.with_suffix(".md").read_text().strip()
    assert "chain-3  3/6 turns" in shown.err


def test_every_configuration_answers_the_same_questions(tmp_path, questions, jobs):
    options = ["--chain", "3", "--tree", "16", "--max-num-seqs", "10", "--max-model-len", "500"]
    assert acceptance.run(parse(tmp_path, "--data", questions, "--seed", "5", *options)) == 0
    plain, chain, tree = (jobs[name] for name in ("plain", "chain-3", "tree-16"))
    conversations = [settings["conversations"] for settings in plain["passes"]]
    for job in (chain, tree):
        assert [settings["conversations"] for settings in job["passes"]] == conversations
    assert [len(conversation["seeds"]) for conversation in conversations[0]] == [2, 1]
    # A budget that never trims a draft.
    assert chain["engine"]["max_num_batched_tokens"] >= 10 * (1 + 3) + 500
    assert tree["engine"]["max_num_batched_tokens"] >= 10 * (1 + 16) + 500
    # Log-probabilities only where they are read: plain decoding, greedily.
    assert [s["runner_up"] for s in plain["passes"]] == [True, False]
    assert not any(s["runner_up"] for s in tree["passes"])


def test_the_settings_of_a_benchmark_are_in_its_results(tmp_path, questions, jobs):
    args = parse(tmp_path, "--data", questions, "--chain", "3", "--tree", "--no-plain")
    assert acceptance.run(args) == 0
    results = json.loads(args.output.read_text())
    assert results["settings"]["data"] == [questions]
    assert results["settings"]["max_tokens"] == 512
    assert "identity" not in results["configurations"][0]["cells"][0]


def test_trees_of_a_given_shape(tmp_path, questions, jobs):
    options = ["--chain", "--tree", "16", "32/4/6", "mc_sim_7b_63"]
    args = parse(tmp_path, "--data", questions, *options)
    assert acceptance.run(args) == 0
    asked = jobs["tree-32-4-6"]["engine"]["speculative_config"]
    assert asked["tree"] == {"depth": 4, "top_k": 6, "verify_budget": None}
    tables = args.output.with_suffix(".md").read_text()
    assert "tree, 32 drafts (depth 4, top-k 6, fixed size)" in tables
    assert "static tree, 25 drafts (fixed size)" in tables


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chain", "3", "3"], "name each one once"),
        (["--tree", "8/4/4", "8/4/4"], "name each one once"),
        (["--tree", "200"], "num_speculative_tokens=200"),
        (["--tree", "32/0/8"], "tree.depth must be"),
        (["--chain", "0"], "--chain 0: a chain has at least one draft"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--chain", "--tree", "--no-plain"], "nothing to measure"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(tmp_path, jobs, options, message):
    with pytest.raises(ValueError, match=message):
        acceptance.run(parse(tmp_path, *options))
    assert not jobs


@pytest.mark.slow
def test_a_tiny_pair_from_end_to_end(tmp_path, questions):
    pair = tiny.write_pair(tmp_path / "pair")
    write_tokenizer(pair.target, tiny.VOCABULARY)
    parser = argparse.ArgumentParser()
    acceptance.add_arguments(parser)
    args = parser.parse_args(
        f"--target {pair.target} --head {pair.head} --data {questions} --chain 3 --tree 8"
        " --temperature 0 --max-tokens 12 --max-num-seqs 2 --max-model-len 256"
        f" --output {tmp_path / 'r.json'}".split()
    )
    assert acceptance.run(args) == 0
    for entry in json.loads(args.output.read_text())["configurations"]:
        (cell,) = entry["cells"]
        assert cell["turns"] == 3
        assert cell["tau"] >= 1.0
        if entry["name"] != "plain":
            assert cell["identity"]["identical"] == cell["identity"]["compared"] == 3
            (counted,) = entry["passes"]
            assert counted["drafts"] > 0
            assert counted["vllm_tau"] >= counted["tau"]
