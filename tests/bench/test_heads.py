import json

import pytest

from vllm_eagle3.cli import main


def task(dataset, temperature, tau, category=None):
    return {
        "dataset": dataset,
        "category": category,
        "temperature": temperature,
        "served": {"tau": tau},
    }


@pytest.fixture
def evaluated(tmp_path):
    """Writes a head's record of training and the results of its evaluation."""

    def write(name, tau, tokens=None, **settings):
        training = {"tokens": tokens, "tokens_seen": 5, "config": {"objective": "eagle3"}}
        shared = {"target": "t", "data": [f"{name}/gsm8k.jsonl", "mt_bench"], "limit": 3}
        tasks = [
            task("gsm8k", 0.0, tau),
            task("mt_bench", 0.0, tau + 1),
            task("mt_bench", 0.0, tau + 5, category="math"),
            task(None, 0.0, tau + 0.5),
        ]
        shape = {"depth": 3, "top_k": 4, "verify_budget": None}
        entry = {"name": "tree-7", "tree": shape, "shape": shape, "num_speculative_tokens": 7}
        results = {
            "kind": "eval",
            "settings": {**shared, "head": f"heads/{name}", **settings},
            "training": training if tokens else {},
            "notes": [],
            "configurations": [{**entry, "error": None, "tasks": tasks}],
        }
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(results))
        return path

    return write


def test_heads_stand_below_one_another(tmp_path, evaluated, capsys):
    small, large = evaluated("small", 2.0, tokens=1_000_000), evaluated("large", 3.0)
    output = tmp_path / "heads.json"
    assert main(["bench", "heads", str(small), f"best={large}", "--output", str(output)]) == 0
    text = output.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    assert "| head | drafts | trained on | GSM8K, T=0 | MT-bench, T=0 | all, T=0 |" in text
    assert "| 1.0 M | 2.00 | 3.00 | 2.50 |" in text
    assert "| - | 3.00 | 4.00 | 3.50 |" in text
    rows = json.loads(output.read_text())["rows"]
    assert [row["name"] for row in rows] == ["small", "best"]
    assert rows[0]["objective"] == "eagle3"
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("setting", ["target", "max_tokens"])
def test_only_heads_that_were_evaluated_alike_compare(evaluated, setting, capsys):
    files = [evaluated("a", 2.0), evaluated("b", 3.0, **{setting: "other"})]
    assert main(["bench", "heads", *map(str, files)]) == 2
    assert f"a and b do not compare: {setting} is" in capsys.readouterr().err


def test_names_are_needed_where_folders_share_theirs(evaluated, capsys):
    path = evaluated("a", 2.0)
    assert main(["bench", "heads", str(path), str(path)]) == 2
    assert "NAME=FILE" in capsys.readouterr().err


def test_other_files_are_refused(tmp_path, capsys):
    (tmp_path / "speed.json").write_text('{"kind": "speed"}')
    for name in ("speed.json", "missing.json"):
        assert main(["bench", "heads", str(tmp_path / name)]) == 2
        assert "no results of `vllm-eagle3 eval`" in capsys.readouterr().err
