"""The scripts of examples/, with a stub in the place of the command that they call."""

import json
import os
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# Writes what `vllm-eagle3` writes, logs each call, and fails where the call has the word $FAIL.
# An evaluation that fails has written its results before, as the real one does.
STUB = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$CALLS"
echo "${CUDA_VISIBLE_DEVICES-all}" >> "$CALLS.gpus"
words=("$@")
for i in "${!words[@]}"; do
  case ${words[$i]} in
    --out) mkdir -p "${words[$i + 1]}" && head=${words[$i + 1]}/model.safetensors ;;
    --output) echo '{}' > "${words[$i + 1]}" ;;
    inspect) echo '{"serving": {"method": "eagle"}}' ;;
  esac
done
[[ -n "$FAIL" && " $* " =~ $FAIL ]] && { echo "no such luck"; exit 1; }
[ -z "${head:-}" ] || touch "$head"
"""
HEADS = ["eagle1", "eagle3", "eagle3-top", "eagle3.1", "hass"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "vllm-eagle3"
    stub.write_text(STUB)
    stub.chmod(0o755)
    return tmp_path


def environment(folder: Path, fail: str, settings: dict[str, str]) -> dict[str, str]:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "CALLS": f"{folder}/calls", "FAIL": fail} | settings


def compare(
    folder: Path, fail: str = "", **settings: str
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run ``compare_heads.sh``; what it ended with, and its calls of ``vllm-eagle3``."""
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    result = subprocess.run(
        ["bash", EXAMPLES / "compare_heads.sh", "target", folder / "data", folder / "out"],
        env=environment(folder, fail, settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = calls.read_text().splitlines() if calls.exists() else []
    return result, [line.split() for line in lines]


def option(call: list[str], name: str) -> str:
    return call[call.index(name) + 1]


def data_of(call: list[str]) -> tuple[str, str]:
    return option(call, "--data"), option(call, "--data-share")


def trained(calls: list[list[str]]) -> list[str]:
    return sorted(Path(option(call, "--out")).name for call in calls if call[0] == "train")


def evaluated(calls: list[list[str]]) -> list[str]:
    return sorted(Path(option(call, "--output")).stem for call in calls if call[0] == "eval")


def test_every_head_is_trained_evaluated_and_in_the_table(folder: Path) -> None:
    result, calls = compare(folder, SHARES="4 2", STEPS="1000")
    assert (result.returncode, result.stderr) == (0, "")
    shares = ["eagle1-1of2", "eagle1-1of4", "eagle3-1of2", "eagle3-1of4"]
    assert trained(calls) == sorted([*HEADS, *shares])
    assert evaluated(calls) == sorted([*HEADS, *shares, "eagle1-static"])
    steps = {Path(option(c, "--out")).name: option(c, "--steps") for c in calls if "--steps" in c}
    assert (steps["eagle3"], steps["eagle3-1of4"]) == ("1000", "250")
    data = {Path(option(c, "--out")).name: data_of(c) for c in calls if c[0] == "train"}
    assert set(data.values()) == {(f"{folder}/data", share) for share in ("1", "0.5", "0.25")}
    assert (data["hass"][1], data["eagle3-1of2"][1], data["eagle1-1of4"][1]) == ("1", "0.5", "0.25")
    table = " ".join(calls[-1])
    assert table.startswith("bench heads ")
    for name in [*HEADS, *shares, "eagle1-static"]:
        assert f"{folder}/out/{name}.json" in table
        assert json.loads((folder / "out" / f"{name}.json").read_text()) == {}
    assert not list((folder / "out").glob("*.partial"))


def test_no_shares(folder: Path) -> None:
    result, calls = compare(folder, SHARES="")
    assert (result.returncode, trained(calls)) == (0, HEADS)
    assert evaluated(calls) == sorted([*HEADS, "eagle1-static"])
    assert "1of" not in " ".join(calls[-1])


def test_which_heads_have_shares_is_a_setting(folder: Path) -> None:
    result, calls = compare(folder, SHARES="2", SCALED="hass")
    assert (result.returncode, trained(calls)) == (0, sorted([*HEADS, "hass-1of2"]))


@pytest.mark.parametrize(
    ("gpus", "jobs", "seen"), [("3,5", "4", {"3", "5"}), ("7", "2", {"7"}), ("3,5", "1", {"3"})]
)
def test_jobs_have_the_visible_gpus_in_turn(
    folder: Path, gpus: str, jobs: str, seen: set[str]
) -> None:
    result, calls = compare(folder, SHARES="", JOBS=jobs, CUDA_VISIBLE_DEVICES=gpus)
    assert result.returncode == 0
    given = (folder / "calls.gpus").read_text().splitlines()
    assert len(given) == len(calls)
    assert (set(given[:-1]), given[-1]) == (seen, gpus)  # the table is made where all are seen


@pytest.mark.parametrize("jobs", ["1", "4"])
def test_a_failed_training_names_its_log(folder: Path, jobs: str) -> None:
    result, calls = compare(folder, fail="^ train .*--objective hass ", JOBS=jobs)
    assert result.returncode != 0
    assert f"training hass failed: {folder}/out/hass.train.log\n" in result.stderr
    assert (folder / "out" / "hass.train.log").read_text() == "no such luck\n"
    assert not evaluated(calls)


def test_a_failed_evaluation_is_made_again(folder: Path) -> None:
    result, calls = compare(folder, fail="^ eval .*/eagle3[.]1[.]json ", SHARES="", JOBS="2")
    assert result.returncode != 0
    assert f"evaluating eagle3.1 failed: {folder}/out/eagle3.1.eval.log\n" in result.stderr
    assert not (folder / "out" / "eagle3.1.json").exists()
    assert calls[-1][:2] != ["bench", "heads"]
    made = {path.stem for path in (folder / "out").glob("*.json")}
    result, calls = compare(folder, SHARES="", JOBS="2")
    assert (result.returncode, trained(calls)) == (0, [])
    assert evaluated(calls) == sorted({*HEADS, "eagle1-static"} - made)
    assert calls[-1][:2] == ["bench", "heads"]


def test_an_interrupted_training_goes_on_and_its_head_is_served_by_its_method(folder: Path) -> None:
    (folder / "bin" / "vllm").symlink_to("vllm-eagle3")

    def run(fail: str = "") -> tuple[int, list[str]]:
        (folder / "calls").unlink(missing_ok=True)
        script = ["bash", EXAMPLES / "train_head.sh", "target", "head"]
        env = environment(folder, fail, {"OBJECTIVE": "eagle1", "REPLICAS": "3"})
        code = subprocess.run(script, cwd=folder, env=env, timeout=60, check=False).returncode
        return code, (folder / "calls").read_text().splitlines()

    code, calls = run(fail="^ train ")
    assert (code, [call.split()[0] for call in calls]) == (1, ["data", "train"])
    assert "--minutes 6 --replicas 3 " in calls[0]
    assert "--objective eagle1 --epochs 200 --minutes 8" in calls[1]
    assert "--resume" not in calls[1]
    (folder / "head" / "training_state.pt").touch()
    (folder / "head-data" / "metadata.json").touch()
    code, calls = run()
    assert (code, [call.split()[0] for call in calls]) == (0, ["train", "inspect", "serve"])
    assert calls[0].endswith("--resume")
    config = json.loads(calls[-1].partition("--speculative-config ")[2])
    assert (config["method"], config["model"], config["tree"]) == ("eagle", "head", True)
