import json

import pytest

from tests.bench.results_of_speed import cell, results
from vllm_eagle3 import cli
from vllm_eagle3.bench.plot import merge

REPEATS = [{"plain": 4.0, "chain-3": 2.0, "tree-8": 1.0}]
LATER = [{"plain": 4.0, "chain-3": 2.0, "tree-16": 1.6}]


def write(path, measured):
    # As bench speed writes it.
    path.write_text(json.dumps({**measured, "rounds": [["plain"]]}))
    return str(path)


def test_plots_of_results_in_a_file(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "r.json", results(cell(1, 0.0, REPEATS)))
    assert cli.main(["bench", "plot", path]) == 0
    assert "### T=0" in (tmp_path / "r.md").read_text()
    assert capsys.readouterr().out.split() == [str(tmp_path / "r-speedup.png")]


def test_several_runs_in_one_table(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    first = write(tmp_path / "a.json", results(cell(1, 0.0, REPEATS), notes=["Widened."]))
    second = results(cell(1, 0.0, LATER), cell(4, 0.0, LATER), notes=["Widened."])
    paths = [first, write(tmp_path / "b.json", second)]
    assert cli.main(["bench", "plot", *paths, "--output", str(tmp_path / "both.json")]) == 0
    merged = json.loads((tmp_path / "both.json").read_text())
    names = [entry["name"] for entry in merged["configurations"]]
    assert names == ["plain", "chain-3", "tree-8", "tree-16"]
    assert [summary["round"] for summary in merged["summary"]] == [0, 1, 1]
    assert merged["notes"] == ["Widened."]
    text = (tmp_path / "both.md").read_text()
    assert "| `tree-8` | 20 |  |\n| `tree-16` | 12 | 12 |" in text
    assert cli.main(["bench", "plot", *paths]) == 2
    assert "give --output" in capsys.readouterr().err


def test_runs_that_differ_in_more_do_not_go_together():
    longer, other_gpu = results(cell(1, 0.0, REPEATS)), results(cell(1, 0.0, REPEATS))
    longer["settings"]["max_tokens"] = 64
    for entry in other_gpu["configurations"]:
        entry["engine"] = {**entry["engine"], "device": "another GPU"}
    for part, message in [(longer, "max_tokens is 20 and 64"), (other_gpu, "another GPU")]:
        with pytest.raises(ValueError, match=message):
            merge([results(cell(1, 0.0, REPEATS)), part])


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "other"}'])
def test_other_files_are_refused(tmp_path, text, capsys):
    path = tmp_path / "r.json"
    path.write_text(text)
    assert cli.main(["bench", "plot", str(path)]) == 2
    assert "r.json: not" in capsys.readouterr().err
