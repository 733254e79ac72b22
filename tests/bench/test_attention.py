"""The attention benchmark without a GPU: our kernels' reference, and a clock that is told."""

import json
import time

import pytest
import torch

from vllm_eagle3.bench import attention
from vllm_eagle3.bench.attention_report import render
from vllm_eagle3.bench.attention_sides import SIDES, Cell, Inputs, Model, Pool

CPU = torch.device("cpu")
TINY = Model(heads=4, kv_heads=2, head_dim=16, page=16, dtype=torch.float32)


class Clock:
    """Runs what it times; each replay takes 100 us for each call, and one more than the last."""

    def __init__(self):
        self.count = 0

    def prepare(self, calls):
        for call in calls:
            call()
        return len(calls)

    def microseconds(self, prepared):
        self.count += 1
        return prepared * (100.0 + self.count)


def measure(cells, names=("portable",), **settings):
    defaults = {
        "repeats": 3,
        "cold_bytes": 64 * TINY.token_bytes,
        "memory": 1 << 30,
        "deadline": time.monotonic() + 60,
        "device": CPU,
    }
    return attention.measure(TINY, cells, list(names), Clock(), **(defaults | settings))


def test_results_of_cells_large_small_and_late():
    cells = attention.plan([20, 10**7], [1, 3], [4], draft=2)
    assert [(c.context, c.batch, c.rows, c.draft) for c in cells[:3]] == [
        (20, 1, 4, False),
        (20, 3, 4, False),
        (10**7, 1, 4, False),
    ]
    results = measure(cells)
    first, large = results["cells"][0], results["cells"][2]
    assert first["samples"]["portable"] == [101.0, 102.0, 103.0]
    assert first["microseconds"]["portable"] == 102.0
    # 64 tokens of cold cache, 20 of them in a call.
    assert first["calls"] == 4
    assert first["read_bytes"] == 20 * TINY.token_bytes
    assert first["agree"]
    assert "do not fit" in large["skipped"]
    json.dumps(results)
    late = measure(cells[:1], deadline=0.0)["cells"][0]
    assert late["skipped"] == "no time left"


def test_ratios_are_taken_within_a_repeat(monkeypatch):
    monkeypatch.setitem(SIDES, "fa3_causal", SIDES["portable"])
    entry = measure([Cell(20, 2, 4)], ["fa3_causal", "portable"])["cells"][0]
    # Rotating order: 101 102 | 104 103 (backwards) | 106 105 (starts with the other).
    assert entry["samples"] == {"fa3_causal": [101, 104, 106], "portable": [102, 103, 105]}
    assert entry["ratio"] == {"portable": pytest.approx(105 / 106)}


def test_sides_that_differ_are_reported(monkeypatch):
    def wrong(inputs):
        right = SIDES["portable"](inputs)
        return lambda table: right(table) + 1.0

    monkeypatch.setitem(SIDES, "fa3_finish", wrong)
    results = measure([Cell(20, 2, 4)], ["portable", "fa3_finish"])
    assert not results["cells"][0]["agree"]
    results |= {"device": "a GPU", "bandwidth": 4.3}
    assert "do not compute the same** in 20 x 2 x 4" in render(results)


def test_the_report_shows_every_cell(monkeypatch):
    monkeypatch.setitem(SIDES, "fa3_causal", SIDES["portable"])
    cells = attention.plan([20, 10**7], [2], [4], draft=2)
    results = measure(cells, ["fa3_causal", "portable"])
    text = render(results | {"device": "a GPU", "bandwidth": 4.3})
    assert "4/2 heads of 16, float32, pages of 16 tokens" in text
    assert "| context | batch | N | FA3 causal | portable | floor |" in text
    assert "| 20 | 2 | 4 | 104.0 | 103.0 (0.99) | 0.0 |" in text
    assert "Drafting" in text
    assert "10000000 x 2 x 4, 5 GB do not fit" in text


def test_calls_read_other_pages_and_draft_trees_keep_their_levels():
    cell = Cell(20, 2, 3, draft=True)
    pool = Pool(TINY, 200, CPU)
    inputs = Inputs(TINY, cell, pool, calls=3)
    pages = torch.cat([table.flatten() for table in inputs.tables])
    assert len(pages.unique()) == len(pages) == 3 * 2 * 2
    before = [rows.clone() for rows in inputs.scratch]
    SIDES["portable"](inputs)(inputs.tables[0])
    for b in range(2):
        assert torch.equal(
            inputs.scratch[0][15 * b + 12 : 15 * b + 15], inputs.key[3 * b : 3 * b + 3]
        )
        assert torch.equal(inputs.scratch[1][15 * b : 15 * b + 12], before[1][15 * b : 15 * b + 12])
    # Row 2 of the last level is node 14: below 6, 2 and 0.
    assert int(inputs.bits[2]) == sum(1 << node for node in (14, 6, 2, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], [1], [4], 8), "--context"),
        (([9], [1], [65], 8), "--nodes"),
        (([9], [1], [4], 13), "--draft"),
    ],
)
def test_sizes_that_cannot_be_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention.plan(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    import argparse

    parser = argparse.ArgumentParser()
    attention.add_arguments(parser)
    with pytest.raises(ValueError, match="CUDA GPU"):
        attention.run(parser.parse_args(["--output", str(tmp_path / "x.json")]))
