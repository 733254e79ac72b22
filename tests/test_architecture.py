"""Who may import whom, what an import costs, and how long a file may be."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_eagle3

PACKAGE = Path(vllm_eagle3.__file__).parent
REPOSITORY = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Part of the package: the parts it may import besides itself.
MAY_IMPORT = {
    "paths": set(),
    "config": {"paths"},
    "files": set(),
    "options": set(),
    "corpus": {"files"},
    "data": {"corpus", "files", "heads"},
    "tree": {"config", "paths"},
    "ops": {"config", "tree"},
    "heads": {"config", "files"},
    "engine": {"config", "corpus", "data", "files", "heads", "options", "tree", "ops"},
    "train": {"config", "corpus", "data", "files", "heads", "ops", "tree"},
}
ANYTHING = {"bench", "cli", "demo"}
# Part: the heavy packages it may import. engine/ alone sees vLLM's private modules.
HEAVY = {
    "paths": set(),
    "config": set(),
    "files": set(),
    "options": set(),
    "corpus": set(),
    "data": {"transformers"},
    "cli": set(),
    "tree": {"torch"},
    "ops": {"torch", "triton"},
    "heads": {"torch"},
    "train": {"torch", "transformers"},
    "engine": {"torch", "triton", "transformers", "vllm"},
    "bench": {"torch", "transformers", "vllm"},
    "demo": {"torch", "transformers", "vllm"},
}
# What bench/ and demo/ may use of vLLM: what its users use.
PUBLIC = {
    "vllm",
    "vllm.LLM",
    "vllm.RequestOutput",
    "vllm.SamplingParams",
    "vllm.platforms.current_platform",
    "vllm.sampling_params.RequestOutputKind",
}
LIMIT_LINES = 300


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere, `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(REPOSITORY).parent.parts
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*base, *filter(None, [node.module])))
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def test_the_rules_name_every_part():
    assert {part_of(path) for path in FILES} - {"__init__"} <= set(HEAVY)
    assert set(MAY_IMPORT) | ANYTHING == set(HEAVY)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_in_one_direction(path):
    part = part_of(path)
    for imported in imports(path):
        package, *rest = imported.split(".")
        if package != "vllm_eagle3" or part in ANYTHING or not rest:
            continue
        allowed = MAY_IMPORT.get(part, set()) | {part, "__version__"}
        assert rest[0] in allowed, f"{part} must not import {imported}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_packages_stay_where_they_belong(path):
    part = part_of(path)
    for imported in imports(path):
        package = imported.split(".")[0]
        if package in {"torch", "triton", "transformers", "vllm"}:
            assert package in HEAVY.get(part, set()), f"{part} must not import {imported}"
        if package == "vllm" and part != "engine":
            assert imported in PUBLIC, f"{part} must not import {imported}"


def modules_after(statement: str) -> set[str]:
    """Top-level packages in memory after a statement in a fresh interpreter."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout
    return {name.split(".")[0] for name in json.loads(output.splitlines()[-1])}


@pytest.mark.parametrize(
    "statement",
    [
        "import vllm_eagle3",
        "import vllm_eagle3.config",
        "import vllm_eagle3.cli",
        "import vllm_eagle3.engine.plugin",
        "import vllm_eagle3.engine.doctor",
        "import vllm_eagle3.engine.contract",
        "from vllm_eagle3.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_an_import_costs_neither_torch_nor_vllm(statement):
    assert not modules_after(statement) & {"torch", "triton", "transformers", "vllm", "numpy"}


REGISTER_TWICE = """
import vllm.v1.worker.gpu.spec_decode as spec_decode
from vllm.engine.arg_utils import EngineArgs
from vllm_eagle3.engine.plugin import is_registered, register

stock = spec_decode.init_speculator, EngineArgs.create_engine_config
assert not is_registered()
register()
first = spec_decode.init_speculator, EngineArgs.create_engine_config
register()
assert is_registered()
assert (spec_decode.init_speculator, EngineArgs.create_engine_config) == first
assert all(new is not old for new, old in zip(first, stock))
assert "vllm.v1.worker.gpu.model_runner" not in sys.modules
assert not any(name.startswith("vllm_eagle3.ops") for name in sys.modules)
"""


def test_loading_the_plugin_twice_wraps_once():
    assert "vllm" in modules_after(REGISTER_TWICE)


def test_files_stay_short():
    files = [*FILES, *REPOSITORY.glob("tests/**/*.py"), *REPOSITORY.glob("examples/**/*.py")]
    lengths = {str(path): len(path.read_text().splitlines()) for path in files}
    assert {path: lines for path, lines in lengths.items() if lines > LIMIT_LINES} == {}
