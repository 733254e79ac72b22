import argparse
import json

import pytest

from vllm_eagle3.bench import memory
from vllm_eagle3.bench.jobs import WorkerError


@pytest.fixture
def started(monkeypatch):
    """Engines with room for 1000 blocks, less one for each draft; those of 63 drafts fail."""
    alive, started = [], []

    class FakeEngine:
        def __init__(self, name, settings, log_path):
            self.drafts = settings["speculative_config"]["num_speculative_tokens"]
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
            blocks = 1000 - self.drafts
            sizes = {"num_gpu_blocks": blocks, "block_size": 16, "kv_cache_tokens": 16 * blocks}
            return {"event": "ready", "device": "a GPU", **sizes}

    monkeypatch.setattr(memory, "Engine", FakeEngine)
    monkeypatch.setattr(memory, "check_plugin", lambda configurations: None)
    return started


def parse(tmp_path, options):
    parser = argparse.ArgumentParser()
    memory.add_arguments(parser)
    base = f"--target t --head h --output {tmp_path / 'm.json'}"
    return parser.parse_args(f"{base} {options}".split())


def test_engines_start_alone_with_the_same_share(tmp_path, started, capsys):
    args = parse(tmp_path, "--chain 0 3 --tree 8/2/8 --gpu-memory-utilization 0.7")
    assert memory.run(args) == 0
    shares = {settings["gpu_memory_utilization"] for _, settings in started}
    assert (len(started), shares) == (3, {0.7})
    assert all(settings["measure_kv_cache"] for _, settings in started)
    shown = capsys.readouterr().out
    assert "| `tree-8-2-8` | 992 | 15872 | 0.9920 |" in shown
    assert shown.strip() == args.output.with_suffix(".md").read_text().strip()


def test_one_that_fails_leaves_the_others(tmp_path, started):
    args = parse(tmp_path, "--chain 63 3 --tree")
    assert memory.run(args) == 1
    results = json.loads(args.output.read_text())
    assert results["engines"].keys() == {"chain-3"}
    assert results["errors"] == {"chain-63": "no memory"}


def test_nothing_to_measure_is_refused(tmp_path, started):
    with pytest.raises(ValueError, match="give --chain or --tree"):
        memory.run(parse(tmp_path, "--chain --tree"))
