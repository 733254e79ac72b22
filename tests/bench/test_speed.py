import argparse
import json
import shutil

import pytest

from tests.bench.chat import write_tokenizer
from tests.bench.results_of_speed import wave
from tests.engine import tiny
from vllm_eagle3.bench import comparison, speed
from vllm_eagle3.bench.jobs import WorkerError

READY = {
    "event": "ready",
    "device": "a GPU",
    "vllm": "0.33.0",
    "torch": "2.13",
    "dtype": "bfloat16",
    "enforce_eager": False,
    "cudagraph_mode": "FULL_AND_PIECEWISE",
    "graph_warnings": [],
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = tiny.write_pair(tmp_path_factory.mktemp("pair"))
    write_tokenizer(pair.target, tiny.VOCABULARY)
    return pair


@pytest.fixture
def parse(tmp_path, pair):
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"turns": [f"question {n}"]}) + "\n" for n in range(4)))

    def parse(options):
        parser = argparse.ArgumentParser()
        speed.add_arguments(parser)
        base = f"--target {pair.target} --head {pair.head} --data {data}"
        return parser.parse_args(f"{base} --output {tmp_path / 'r.json'} {options}".split())

    return parse


class FakeEngine:
    """Answers at a speed of its own; ``tree-8`` fails at its third measurement."""

    made: list["FakeEngine"]
    busy: list[str]

    def __init__(self, name, settings, log_path, environment):
        self.name, self.settings, self.environment = name, settings, environment
        self.ready = READY
        self.measured = []
        FakeEngine.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def ask_to_stop(self): ...

    def wait_stopped(self): ...

    def wait_ready(self, timeout):
        if self.name == "chain-7":
            raise WorkerError("no memory")

    def measure(self, waves, temperature, max_tokens, timeout):
        FakeEngine.busy.append(self.name)
        self.measured.append((waves, temperature))
        if self.name == "tree-8" and len(self.measured) == 3:
            raise WorkerError("lost the GPU")
        seconds = {"plain": 4.0, "chain-1": 3.0, "chain-3": 2.0}.get(self.name, 1.0)
        return {
            "event": "measured",
            "waves": [wave(seconds, requests=len(w)) for w in waves],
            "counters": {"preemptions": 0},
        }

    def profile(self, *_):
        return None


@pytest.fixture
def engines(monkeypatch):
    FakeEngine.made, FakeEngine.busy = [], []
    monkeypatch.setattr(comparison, "Engine", FakeEngine)
    monkeypatch.setattr(speed, "check_plugin", lambda configurations: None)
    return FakeEngine


def read(args):
    return json.loads(args.output.read_text())


def test_all_configurations_answer_the_same_in_rotating_order(parse, engines):
    args = parse("--chain 1 3 --tree 16 --batch 1 2 --temperature 0 --repeats 3")
    assert speed.run(args) == 0
    first, *others = engines.made
    assert all(engine.measured == first.measured for engine in others)
    # A warm-up and three repeats in both cells; three single prompts, then two pairs.
    assert [len(waves) for waves, _ in first.measured] == [3] * 4 + [2] * 4
    results = read(args)
    assert [len(cell["repeats"]) for cell in results["cells"]] == [3, 3]
    orders = [repeat["order"] for repeat in results["cells"][0]["repeats"]]
    assert orders[0] == ["plain", "chain-1", "chain-3", "tree-16"]
    assert orders[1] == orders[0][::-1]
    (small, _) = results["summary"]
    assert small["best_chain"] == "chain-3"
    assert small["over_best_chain"]["tree-16"]["tokens_per_second"]["median"] == 2.0


def test_later_rounds_repeat_plain_decoding_and_the_best_chain(parse, engines):
    options = "--chain 1 3 --tree 16 31 --batch 1 --temperature 0 --repeats 1"
    args = parse(f"{options} --engines-at-once 3")
    assert speed.run(args) == 0
    results = read(args)
    assert results["rounds"] == [
        ["plain", "chain-1", "chain-3"],
        ["plain", "chain-3", "tree-16"],
        ["plain", "chain-3", "tree-31"],
    ]
    assert [cell["round"] for cell in results["cells"]] == [0, 1, 2]
    assert results["summary"][2]["over_best_chain"].keys() == {"tree-31"}


def test_those_that_fail_leave_the_others(parse, engines, capsys):
    args = parse("--chain 3 7 --tree 8 16 --batch 1 --temperature 0 1 --repeats 2")
    assert speed.run(args) == 1
    results = read(args)
    errors = {entry["name"]: entry["error"] for entry in results["configurations"]}
    assert (errors["chain-7"], errors["tree-8"]) == ("no memory", "lost the GPU")
    greedy, sampled = results["summary"]
    assert greedy["over_best_chain"]["tree-8"]["tokens_per_second"]["n"] == 1
    assert greedy["over_best_chain"]["tree-16"]["tokens_per_second"]["n"] == 2
    assert sampled["configurations"].keys() == {"plain", "chain-3", "tree-16"}
    assert "`chain-7` failed" in capsys.readouterr().out


def test_engines_get_the_same_settings(parse, engines, tmp_path):
    args = parse(
        f"--chain 3 --tree 16 --batch 2 --temperature 0 --repeats 1 --max-tokens 20 --profile 2"
        f" --compile-cache {tmp_path / 'cache'} --engine" + ' {"block_size":32}'
    )
    assert speed.run(args) == 0
    plain, chain, tree = (engine.settings for engine in engines.made)
    special = {"speculative_config"}
    for settings in (chain, tree):
        assert {k: v for k, v in settings.items() if k not in special} == {
            k: v for k, v in plain.items() if k not in special
        }
    assert plain["enable_prefix_caching"] is False
    assert plain["block_size"] == 32
    assert plain["max_num_seqs"] == 2
    assert plain["profiler_config"]["max_iterations"] == 30
    folders = [engine.environment["VLLM_CACHE_ROOT"] for engine in engines.made]
    assert len(set(folders)) == 3


def test_a_widened_pair_says_so(parse, engines, tmp_path):
    args = parse("--chain 3 --tree --batch 1 --temperature 0 --repeats 1")
    wide = tmp_path / "wide"
    shutil.copytree(args.target, wide)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"widened": {"purpose": "No model."}}))
    args.target = str(wide)
    assert speed.run(args) == 0
    assert read(args)["notes"] == ["No model."]
    assert "\nNo model.\n" in args.output.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("told", "note"),
    [
        ({"enforce_eager": True}, "without CUDA graphs"),
        ({"cudagraph_mode": "NONE"}, "without CUDA graphs"),
        ({"graph_warnings": ["CUDAGraphMode.FULL is not supported"]}, "FULL is not supported"),
    ],
)
def test_engines_without_graphs_are_told(parse, engines, monkeypatch, told, note):
    monkeypatch.setitem(globals(), "READY", READY | told)
    args = parse("--chain 3 --tree 8 --batch 1 --temperature 0 --repeats 1")
    assert speed.run(args) == 0
    assert any(note in text for text in read(args)["notes"])


def test_a_spent_budget_writes_what_there_is(parse, engines, monkeypatch):
    args = parse("--chain 3 --tree 16 --batch 1 2 --temperature 0 --repeats 5 --time-budget 60")
    times = iter([0.0, *[1.0] * 6, *[100.0] * 100])
    monkeypatch.setattr(comparison.time, "monotonic", lambda: next(times))
    assert speed.run(args) == 0
    (cell,) = read(args)["cells"]
    assert 1 <= len(cell["repeats"]) < 5
    assert args.output.with_suffix(".md").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--chain 3 3", "name each one once"),
        ("--tree 31/6", "31/6/8"),
        ("--tree 200", "num_speculative_tokens=200"),
        ("--repeats 0", "--repeats must be at least 1"),
        ("--max-tokens 1", "--max-tokens must be at least 2"),
        ("--batch 1 0", "--batch must be at least 1"),
        ("--chain 0", "--chain 0: a chain has at least one draft"),
        ("--batch 1 --profile 2", "--profile: at most the largest batch"),
        ("--no-plain --chain --tree", "nothing to measure"),
        ("--max-prompt 1", "--max-prompt 1"),
        ("--data missing.jsonl", "missing.jsonl"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(parse, engines, options, message):
    with pytest.raises(ValueError, match=message):
        speed.run(parse(options))
    assert not engines.made


@pytest.mark.slow
def test_a_tiny_pair_from_end_to_end(parse):
    args = parse(
        "--chain 1 --tree 3/1/3 --no-plain --batch 2 --temperature 0 --repeats 2 --max-tokens 4"
        " --prompts-per-repeat 1 --max-num-batched-tokens 128"
    )
    assert speed.run(args) == 0
    results = read(args)
    assert "a test, no speeds" in results["notes"][0]
    (cell,) = results["cells"]
    for repeat in cell["repeats"]:
        for run in repeat["runs"].values():
            assert [w["tokens"] for w in run["waves"]] == [8]
            assert 0 < run["waves"][0]["decode_seconds"] < run["waves"][0]["seconds"]
            assert run["counters"]["drafts"] > 0
    (summary,) = results["summary"]
    assert summary["best_chain"] == "chain-1"
    assert summary["over_best_chain"]["tree-3-1-3"]["tokens_per_second"]["n"] == 2
    assert summary["configurations"]["tree-3-1-3"]["tau"] >= 1
