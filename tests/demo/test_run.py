import argparse
import io

import pytest
from rich.console import Console

from tests.heads import checkpoints
from vllm_eagle3.bench.configurations import PLAIN, chain, tree
from vllm_eagle3.bench.jobs import WorkerError
from vllm_eagle3.bench.results import Run
from vllm_eagle3.demo import run as demo

TEXTS = ["The", " sky", " is", " blue", "."]


def answer(number, steps, tokens=(1, 2, 3, 4, 5)):
    """The events of one streamed answer."""
    where = {"dataset": "demo", "number": number, "turn": 0}
    rest = list(TEXTS)
    for position, count in enumerate(steps, 1):
        texts, rest = rest[:count], rest[count:]
        yield {"event": "step", **where, "texts": texts, "finished": position == len(steps)}
    yield {"event": "turn", **where, "temperature": 0.0, "tokens": list(tokens), "steps": steps}


def run_of(*answers):
    result = Run()
    for events in answers:
        for event in events:
            result.receive(event)
    return result


def test_the_closing_table():
    plain = run_of(answer(0, [1] * 5), answer(1, [1] * 5))
    chained = run_of(answer(0, [1, 2, 2]), answer(1, [1, 2, 2]))
    parted = run_of(answer(0, [1, 4]), answer(1, [1, 4], tokens=[1, 2, 9, 4, 5]))
    rows = demo.summary_rows([PLAIN, chain(5), tree(32)], [plain, chained, parted])
    assert rows == [
        ("plain decoding", "10", "8", "1.00", ""),
        ("chain of 5 drafts (vLLM's own)", "10", "4", "2.00", "yes"),
        ("dynamic tree of 32 drafts", "10", "2", "4.00", "no, 1 of 2 part"),
    ]


def test_a_failed_way_is_no_identical_output():
    failed = Run(error="exit code 1")
    rows = demo.summary_rows([PLAIN, tree(32)], [run_of(answer(0, [1] * 5)), failed])
    assert rows[1][1:] == ("0", "0", "-", "failed")
    # Nor can anything be compared with a plain run that failed.
    assert demo.summary_rows([PLAIN, chain(5)], [failed, Run()])[1][-1] == "failed"


def test_an_answer_of_which_nothing_came_is_no_identical_output():
    plain = run_of(answer(0, [1] * 5), answer(1, [1] * 5))
    rows = demo.summary_rows([PLAIN, tree(32)], [plain, run_of(answer(0, [1, 4]))])
    assert rows[1][-1] == "no, 1 of 2 missing"


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100, highlight=False)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Arguments with made-up models, and an engine that drafts well or fails."""
    checkpoints.write(tmp_path / "head", checkpoints.flat(), checkpoints.tensors())
    checkpoints.write_target(tmp_path / "target")

    def run_worker(job, log_path):
        drafts = job["engine"]["speculative_config"]
        yield {"event": "ready"}
        for conversation in job["passes"][0]["conversations"]:
            yield from answer(conversation["number"], [1, 4] if drafts else [1] * 5)
        if drafts and "fails" in drafts["model"]:
            raise WorkerError("the engine's process ended with exit code 1")

    monkeypatch.setattr(demo, "run_worker", run_worker)
    monkeypatch.setattr(demo, "check_plugin", lambda configurations: None)
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)

    def parse(*options):
        fixed = ["--target", str(tmp_path / "target"), "--head", str(tmp_path / "head")]
        return parser.parse_args([*fixed, "--artifacts", str(tmp_path / "artifacts"), *options])

    return parse


def test_the_three_ways_one_after_another(settings, capsys):
    assert demo.run(settings("--prompt", "Why is the sky blue?")) == 0
    shown = capsys.readouterr().out
    assert shown.count("Why is the sky blue?") == 3
    assert shown.count("The sky is blue.\n") == 1
    assert shown.count("The⟨ sky is blue⟩.\n") == 2
    assert "1/3  plain decoding" in shown
    assert "3/3  dynamic tree of 32 drafts" in shown
    assert "⟨text⟩: drafted and accepted" in shown
    assert shown.count("yes") == 2


def test_a_static_tree_is_called_one(settings, capsys):
    assert demo.run(settings("--tree", "mc_sim_7b_63")) == 0
    assert "3/3  static tree of 25 drafts" in capsys.readouterr().out


def test_a_failure_is_shown_and_told_to_the_shell(settings, tmp_path, capsys):
    (tmp_path / "head").rename(tmp_path / "fails")
    assert demo.run(settings("--head", str(tmp_path / "fails"))) == 1
    assert "failed: the engine's process ended with exit code 1" in capsys.readouterr().out


def test_a_missing_head_is_named(settings, tmp_path):
    with pytest.raises(ValueError, match="no EAGLE-3 head there"):
        demo.run(settings("--head", str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["--target", "/no/such"], "--target /no/such: no such folder"),
    ],
)
def test_a_mistake_ends_before_an_engine_starts(settings, monkeypatch, options, said):
    def start(job, log_path):
        raise AssertionError("an engine started")

    monkeypatch.setattr(demo, "run_worker", start)
    with pytest.raises(ValueError, match=said):
        demo.run(settings(*options))


def test_markup_in_a_text_is_only_text(console):
    demo._print_step(console, ["[bold]", "[/x]", " list[0]"])
    assert console.file.getvalue() == "⟨[bold][/x]⟩ list[0]"


def test_colours_on_a_terminal():
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    demo._print_step(console, ["drafted", " own"])
    assert console.file.getvalue() == "\x1b[1;32mdrafted\x1b[0m own"


def test_an_interrupted_conversion_is_no_target(tmp_path, console, monkeypatch):
    from vllm_eagle3.demo import smollm2

    folder = tmp_path / "target"

    def interrupted(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo._converted_target(folder, console)
    assert not folder.exists()

    def complete(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "convert", complete)
    assert demo._converted_target(folder, console) == folder
    monkeypatch.setattr(smollm2, "convert", interrupted)
    assert demo._converted_target(folder, console) == folder
