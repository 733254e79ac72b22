import argparse
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.engine import tiny
from vllm_eagle3.bench import servers, serving
from vllm_eagle3.bench.jobs import WorkerError
from vllm_eagle3.bench.questions import PACKAGED, load_questions
from vllm_eagle3.bench.servers import Server, run_client, to_flags

# vLLM's command line asks for a distribution named vllm; a CPU build has another name.
CLIENT = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def parse(tmp_path, options):
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"turns": [f"question {n}"]}) + "\n" for n in range(4)))
    parser = argparse.ArgumentParser()
    serving.add_arguments(parser)
    return parser.parse_args(f"--data {data} --output {tmp_path / 's.json'} {options}".split())


def test_options_as_a_command_line_has_them():
    options = {"max_model_len": 9, "enforce_eager": True, "enable_prefix_caching": False}
    assert to_flags({**options, "seed": None, "speculative_config": {"method": "eagle3"}}) == [
        "--max-model-len",
        "9",
        "--enforce-eager",
        "--no-enable-prefix-caching",
        "--speculative-config",
        '{"method": "eagle3"}',
    ]


def test_a_server_that_fails_shows_its_last_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "_VLLM", "no_such_module")
    with (
        Server("model", {}, tmp_path / "server.log") as server,
        pytest.raises(WorkerError, match=r"exit code 1; its last lines:\n.*no_such_module"),
    ):
        server.wait_ready(time.monotonic() + 60)


def test_a_client_that_fails_shows_its_last_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "CLIENT", ["-c", "raise SystemExit('no such host')"])
    with pytest.raises(WorkerError, match=r"exit code 1; its last lines:\nno such host"):
        run_client("m", 1, {}, tmp_path / "r.json", 60)


def test_a_server_does_not_outlive_who_started_it():
    """The command writes its process id and would sleep for long."""
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    command = [sys.executable, "-m", "vllm_eagle3.bench.leash", sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        child = int(process.stdout.readline())
        process.stdin.close()
        assert process.wait(10) == -signal.SIGKILL
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        # Without an init process that reaps it, a dead process keeps its entry.
        with open(f"/proc/{child}/stat") as stat:
            if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                return
        time.sleep(0.05)
    pytest.fail("the command lives on")


def test_settings_that_cannot_work_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "check_plugin", lambda configurations: None)
    for options, message in [
        ("--tree 200", "num_speculative_tokens=200"),
        ("--chain 0", "--chain 0: a chain has at least one draft"),
        ("--concurrency 4 0", "--concurrency must be at least 1"),
        ("--max-model-len 0", "--max-model-len must be at least 1"),
        ("--servers-at-once 0", "--servers-at-once must be at least 1"),
        ("--repeats 0", "--repeats must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            serving.run(parse(tmp_path, f"--target t --head o/h {options}"))


@pytest.fixture
def asked(monkeypatch):
    """Runs of the client, as (configuration, options); each takes a millisecond longer.

    The second run of chain-5 fails.
    """
    runs = []

    class FakeServer:
        def __init__(self, model, options, log_path, environment, on_cpu):
            self.port = log_path.stem

        def __enter__(self):
            return self

        def __exit__(self, *_): ...

        def wait_ready(self, deadline): ...

    def run_client(model, port, options, result_path, timeout):
        runs.append((port, options))
        if [name for name, _ in runs].count("chain-5") == 2 and port == "chain-5":
            raise WorkerError("no answer")
        return dict.fromkeys(serving.FIGURES.values(), float(len(runs))) | {"completed": 1}

    monkeypatch.setattr(serving, "Server", FakeServer)
    monkeypatch.setattr(serving, "run_client", run_client)
    monkeypatch.setattr(serving, "kv_bytes_per_token", lambda settings: 1)
    monkeypatch.setattr(serving, "check_plugin", lambda configurations: None)
    return runs


def test_every_run_asks_the_first_chats_of_one_list_that_holds_all_sets(tmp_path, asked):
    parser = argparse.ArgumentParser()
    serving.add_arguments(parser)
    base = ["--target", "t", "--head", "o/h", "--output", str(tmp_path / "s.json")]
    assert serving.run(parser.parse_args([*base, "--tree"])) == 0
    questions = {question.turns[0]: question for question in load_questions(PACKAGED)}
    chats = json.loads((tmp_path / "s.logs" / "chats.json").read_text())
    order = [questions[chat["conversations"][0]["value"]] for chat in chats]
    assert len(order) == len(set(order)) == 240
    for count in range(3, 241):
        assert {question.dataset for question in order[:count]} == set(PACKAGED)
    # The smallest run of all: every set as often, and every category of MT-bench.
    counts = {options["num_prompts"] for _, options in asked}
    assert counts == {30, 40, 160}
    smallest = order[: min(counts)]
    assert [sum(q.dataset == name for q in smallest) for name in PACKAGED] == [10, 10, 10]
    assert len({q.category for q in smallest if q.dataset == "mt_bench"}) == 8
    assert all(options["disable_shuffle"] for _, options in asked)


def test_figures_are_medians_of_repeats_in_rotating_order(tmp_path, asked):
    args = parse(tmp_path, "--target t --head o/h --chain 3 --tree --concurrency 2 --repeats 3")
    assert serving.run(args) == 0
    order = [name for name, _ in asked]
    assert order == ["plain", "chain-3", "chain-3", "plain", "chain-3", "plain"]
    results = json.loads(args.output.read_text())
    assert [(run["name"], run["repeat"]) for run in results["runs"][:3]] == [
        ("plain", 0),
        ("chain-3", 0),
        ("chain-3", 1),
    ]
    # plain took 1, 4 and 6 milliseconds, chain-3 took 2, 3 and 5.
    text = args.output.with_suffix(".md").read_text()
    assert "| `plain` | 2 | 3 | 4.00 |" in text
    assert "| `chain-3` | 2 | 3 | 3.00 |" in text


def test_one_that_fails_keeps_the_figures_of_its_repeats(tmp_path, asked):
    args = parse(tmp_path, "--target t --head o/h --chain 3 5 --tree --no-plain --concurrency 1 2")
    assert serving.run(args) == 1
    text = args.output.with_suffix(".md").read_text()
    assert "| `chain-5` | 1 | 1 | 2.00 |" in text
    assert "| `chain-5` | 2 |" not in text
    assert "| `chain-3` | 2 | 3 |" in text
    assert "`chain-5` failed:\n\n```\nno answer" in text


@pytest.mark.slow
def test_a_tiny_pair_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(servers, "CLIENT", ["-c", CLIENT])
    pair = tiny.write_pair(tmp_path / "pair")
    args = parse(
        tmp_path,
        f"--target {pair.target} --head {pair.head} --no-plain --chain --tree 3/1/3"
        " --concurrency 2 --prompts 1 --min-prompts 3 --repeats 1 --max-tokens 4"
        " --max-model-len 256",
    )
    assert serving.run(args) == 0
    results = json.loads(args.output.read_text())
    (run,) = results["runs"]
    assert run["completed"] == 3
    assert run["repeat"] == 0
    assert run["total_output_tokens"] == 12
    assert 0 < run["p50_ttft_ms"] <= run["p99_ttft_ms"]
    assert "| `tree-3-1-3` | 2 | 1 |" in capsys.readouterr().out
