import builtins
import json

import pytest

from tests.bench.results_of_speed import cell, results
from vllm_eagle3 import cli
from vllm_eagle3.bench.plots import write

MS = {"target": 5, "sampling": 0.1, "draft": 1, "tree": 0.2, "other": 0.1, "idle": 0.1}
REPEATS = [{"plain": 4.0, "chain-3": 2.0, "tree-8": 1.0}]


@pytest.fixture
def measured():
    profiles = [
        {"name": name, "batch_size": batch, "temperature": 0.0, "step_ms": 6.5, "ms": MS}
        for name in ("chain-3", "tree-8")
        for batch in (1, 16)
    ]
    cells = [cell(batch, t, REPEATS) for batch in (1, 16) for t in (0.0, 1.0)]
    return results(*cells, profiles=profiles)


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_speedups_and_steps(tmp_path, measured):
    pytest.importorskip("matplotlib")
    speedup, steps = write(measured, tmp_path / "h200.json")
    assert (speedup.name, steps.name) == ("h200-speedup.png", "h200-steps.png")
    assert is_png(speedup)
    assert is_png(steps)


def test_nothing_measured_makes_no_plots(tmp_path):
    assert write(results(), tmp_path / "r.json") == []


def test_without_matplotlib_the_extra_is_named(tmp_path, measured, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(measured))
    assert cli.main(["bench", "plot", str(path)]) == 2
    assert "pip install '.[bench]' in a checkout" in capsys.readouterr().err
    # The tables are there all the same.
    assert path.with_suffix(".md").exists()
