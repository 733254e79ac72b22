import argparse
import json

import pytest

from vllm_eagle3.bench import memory
from vllm_eagle3.bench.jobs import WorkerError


@pytest.fixture
def started(monkeypatch):
    """Engines with room for 1000 blocks; 50 less with a head, and one less for each draft.

    Those of 63 drafts fail.
    """
    alive, started = [], []

    class FakeEngine:
        def __init__(self, name, settings, log_path):
            speculative = settings["speculative_config"]
            self.drafts = speculative["num_speculative_tokens"] if speculative else None
            started.append((name, settings))

        def __enter__(self):
            assert not alive, "two engines at once share the memory"
            alive.append(self)
            return self

        def __exit__(self, *_):
            alive.clear()

        def ask_to_stop(self): ...

        def wait_stopped(self): ...

        def wait_ready(self, timeout):
            if self.drafts == 63:
                raise WorkerError("no memory")
            blocks = 1000 if self.drafts is None else 950 - self.drafts
            sizes = {"num_gpu_blocks": blocks, "block_size": 16, "kv_cache_tokens": 16 * blocks}
            return {"event": "ready", "device": "a GPU", **sizes}

    monkeypatch.setattr(memory, "Engine", FakeEngine)
    monkeypatch.setattr(memory, "check_plugin", lambda configurations: None)
    return started


def parse(tmp_path, options):
    parser = argparse.ArgumentParser()
    memory.add_arguments(parser)
    base = f"--target t --head o/h --output {tmp_path / 'm.json'}"
    return parser.parse_args(f"{base} {options}".split())


def test_engines_start_alone_with_the_same_share(tmp_path, started, capsys):
    args = parse(tmp_path, "--chain 3 5 --tree 8/2/8 --gpu-memory-utilization 0.7")
    assert memory.run(args) == 0
    shares = {settings["gpu_memory_utilization"] for _, settings in started}
    assert [name for name, _ in started] == ["plain", "chain-3", "chain-5", "tree-8-2-8"]
    assert shares == {0.7}
    assert all(settings["measure_kv_cache"] for _, settings in started)
    shown = capsys.readouterr().out
    assert "| configuration | blocks | tokens | tokens / `chain-3` |" in shown
    assert "| `plain` | 1000 | 16000 | 1.0560 |" in shown
    assert "| `chain-3` | 947 | 15152 | 1.0000 |" in shown
    assert "| `chain-5` | 945 | 15120 | 0.9979 |" in shown
    assert "| `tree-8-2-8` | 942 | 15072 | 0.9947 |" in shown
    assert shown.strip() == args.output.with_suffix(".md").read_text().strip()


def test_one_that_fails_leaves_the_others(tmp_path, started):
    args = parse(tmp_path, "--chain 3 63 --tree 8/2/8")
    assert memory.run(args) == 1
    results = json.loads(args.output.read_text())
    assert results["engines"].keys() == {"plain", "chain-3", "tree-8-2-8"}
    assert results["errors"] == {"chain-63": "no memory"}


def test_nothing_is_compared_with_another_where_the_reference_failed(tmp_path, started):
    args = parse(tmp_path, "--chain 63 3 --tree 8/2/8")
    assert memory.run(args) == 1
    text = args.output.with_suffix(".md").read_text()
    assert "| tokens / `chain-63` |" in text
    assert "| `plain` | 1000 | 16000 | - |" in text
    assert "| `tree-8-2-8` | 942 | 15072 | - |" in text
    assert "`chain-63` failed:\n\n```\nno memory" in text


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ("--chain --tree 8/2/8", "plain"),
        ("--no-plain --chain 5 3 --tree 8/2/8", "chain-5"),
        ("--no-plain --chain --tree 8/2/8 16/2/8", "tree-8-2-8"),
    ],
)
def test_the_reference_is_named(tmp_path, started, options, reference):
    args = parse(tmp_path, options)
    assert memory.run(args) == 0
    text = args.output.with_suffix(".md").read_text()
    assert f"| tokens / `{reference}` |" in text
    (row,) = [line for line in text.splitlines() if line.startswith(f"| `{reference}` |")]
    assert row.endswith("| 1.0000 |")


def test_settings_that_cannot_work_are_refused_at_once(tmp_path, started):
    for options in ("--max-num-seqs 0", "--max-model-len 0"):
        with pytest.raises(ValueError, match=f"{options.split()[0]} must be at least 1"):
            memory.run(parse(tmp_path, options))
    assert not started


def test_nothing_to_measure_is_refused(tmp_path, started):
    with pytest.raises(ValueError, match="give --chain or --tree"):
        memory.run(parse(tmp_path, "--no-plain --chain --tree"))
