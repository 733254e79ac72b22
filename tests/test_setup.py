"""When setup.py compiles the extension, and from what."""

import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools

import vllm_eagle3

REPOSITORY = Path(vllm_eagle3.__file__).parents[1]


@pytest.fixture
def arguments(monkeypatch):
    """Runs setup.py and returns what it asks setuptools for; nothing is built."""

    def run(nvcc: str | None) -> dict:
        found: dict = {}
        monkeypatch.chdir(REPOSITORY)
        monkeypatch.setattr(shutil, "which", lambda name, path=None: nvcc)
        monkeypatch.setattr(setuptools, "setup", lambda **given: found.update(given))
        runpy.run_path("setup.py", run_name="__main__")
        return found

    return run


def test_with_nvcc_one_library_of_all_sources_serves_every_python(arguments):
    given = arguments("/usr/bin/nvcc")
    (extension,) = given["ext_modules"]
    assert extension.name == "vllm_eagle3._C"
    assert extension.py_limited_api
    assert given["options"] == {"bdist_wheel": {"py_limited_api": "cp311"}}
    files = {str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("csrc/*")}
    assert set(extension.sources) | set(extension.depends) == files
    assert {Path(source).suffix for source in extension.sources} == {".cpp", ".cu"}


def test_without_nvcc_the_package_is_pure_python_and_says_so(arguments, capsys):
    given = arguments(None)
    assert given["ext_modules"] == []
    assert given["options"] == {}
    assert "without the CUDA extension, for want of nvcc" in capsys.readouterr().out


def test_a_source_distribution_can_be_compiled(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    sources = {f"csrc/{path.name}" for path in REPOSITORY.glob("csrc/*")}
    assert sources | {"setup.py", "pyproject.toml"} <= held
