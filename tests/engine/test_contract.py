"""The names of vLLM that the plugin touches have the shapes it was written against."""

import ast
import os
import shutil
from pathlib import Path

import pytest

from vllm_eagle3.engine import contract
from vllm_eagle3.engine.ledger import TOUCHED
from vllm_eagle3.engine.sources import Sources

ENGINE = Path(contract.__file__).parent
SYMBOLS = {symbol for symbols in TOUCHED.values() for symbol in symbols}


def test_the_installed_vllm_keeps_the_contract():
    assert contract.compare(contract.installed_root()) == []
    assert contract.check() == contract.version_of(contract.installed_root())


@pytest.mark.parametrize("minor", contract.SUPPORTED)
def test_each_supported_version_is_recorded_in_full(minor):
    assert set(contract.read_record(f"{minor}.0")) == SYMBOLS


def imported_names(path: Path) -> dict[str, str]:
    """Local name to `module:name` of what a file imports from vLLM, directly or by compat."""
    names = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            for alias in node.names:
                local = alias.asname or alias.name
                if module == "vllm_eagle3.engine.compat":
                    names[local] = COMPAT[alias.name]
                elif module.split(".")[0] == "vllm":
                    names[local] = f"{module}:{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vllm":
                    names[alias.asname or alias.name] = alias.name
    return names


def lazy_names(path: Path) -> dict[str, str]:
    """What compat imports only on demand: the literal `_LAZY`, name to module."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_LAZY":
            lazy = ast.literal_eval(node.value)
            return {name: f"{module}:{name}" for name, module in lazy.items()}
    raise AssertionError(f"{path} has no _LAZY")


COMPAT_PATH = ENGINE / "compat.py"
COMPAT = imported_names(COMPAT_PATH) | lazy_names(COMPAT_PATH)
SOURCES = Sources(contract.installed_root())
ENGINE_FILES = sorted(ENGINE.rglob("*.py"))


@pytest.mark.parametrize("path", ENGINE_FILES, ids=lambda path: path.stem)
def test_every_imported_name_is_in_the_ledger(path):
    names = COMPAT if path == COMPAT_PATH else imported_names(path)
    for name in names.values():
        if name.startswith("vllm:"):  # public: what `import vllm` offers
            continue
        if ":" not in name or SOURCES.describe(name) == "module":
            # What is used of a module is in the ledger under its own name.
            module = name.replace(":", ".")
            assert any(s.startswith(f"{module}:") for s in SYMBOLS), f"add names of {module}"
        else:
            assert name in SYMBOLS, f"add {name} to engine/ledger.py"


@pytest.mark.parametrize("path", ENGINE_FILES, ids=lambda path: path.stem)
def test_every_member_of_a_subclassed_class_is_in_the_ledger(path):
    names = imported_names(path)
    for cls in ast.walk(ast.parse(path.read_text())):
        if not isinstance(cls, ast.ClassDef):
            continue
        members = {node.name for node in cls.body if isinstance(node, ast.FunctionDef)}
        members |= {
            node.attr
            for node in ast.walk(cls)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()")
        }
        for base in cls.bases:
            owner = names.get(ast.unparse(base).partition("[")[0])
            for member in members if owner else ():
                symbol = f"{owner}.{member}"
                inherited = SOURCES.describe(symbol) is not None
                assert symbol in SYMBOLS or not inherited, f"add {symbol} to engine/ledger.py"


@pytest.fixture
def changed_vllm(tmp_path, monkeypatch):
    """Check against a copy of the installed sources; returns a function that edits a file."""
    root = tmp_path / "vllm"

    def only_sources(folder: str, names: list[str]) -> list[str]:
        return [n for n in names if not n.endswith(".py") and not Path(folder, n).is_dir()]

    shutil.copytree(contract.installed_root(), root, copy_function=os.symlink, ignore=only_sources)
    monkeypatch.setattr(contract, "installed_root", lambda: root)

    def edit(file: str, old: str, new: str) -> None:
        path = root / file
        text = path.read_text()
        assert old in text
        path.unlink()
        path.write_text(text.replace(old, new))

    return edit


def test_a_changed_signature_is_refused_by_name_and_version(changed_vllm):
    changed_vllm(
        "v1/worker/gpu/spec_decode/__init__.py",
        "    device: torch.device,\n",
        "    device: torch.device,\n    pool: object,\n",
    )
    with pytest.raises(contract.ContractError) as error:
        contract.check()
    message = str(error.value)
    assert "spec_decode:init_speculator" in message
    assert "(vllm_config, device, pool, req_states)" in message
    assert contract.version_of(contract.installed_root()) in message


def test_a_missing_name_is_refused(changed_vllm):
    changed_vllm("v1/worker/gpu/sample/gumbel.py", "def gumbel_sample(", "def gumbel_draw(")
    with pytest.raises(contract.ContractError, match="gumbel:gumbel_sample is missing"):
        contract.check()


def test_an_unsupported_version_is_refused(changed_vllm):
    version = contract.version_of(contract.installed_root())
    changed_vllm("_version.py", f"version = '{version}'", "version = '0.35.0'")
    with pytest.raises(contract.ContractError, match=r"vLLM 0\.35\.0 is not supported.*0\.33\.x"):
        contract.check()


def test_a_missing_vllm_is_refused(monkeypatch):
    monkeypatch.setattr(contract, "find_spec", lambda name: None)
    with pytest.raises(contract.ContractError, match="vLLM is not installed"):
        contract.check()


SOURCE = {
    "__init__.py": "from pkg.base import Base\nfrom .leaf import helper as renamed\n",
    "base.py": "class Root:\n    def __init__(self):\n        self.size = 1\n"
    "class Base(Root):\n    @property\n    def width(self) -> int: return 1\n",
    "leaf.py": "from pkg import Base\n"
    "try:\n    import fast\nexcept ImportError:\n    fast = None\n"
    "def helper(a: int, /, b=2, *c, d: str = 'x', **e) -> None: ...\n"
    "@dataclass(frozen=True)\nclass Leaf(Base):\n    x: int\n    y: int = 3\n"
    "    @staticmethod\n    def make(n): ...\n",
}


@pytest.mark.parametrize(
    ("symbol", "shape"),
    [
        ("pkg:Base", "class (Root)"),
        ("pkg:renamed", "function (a, /, b=2, *c, d='x', **e)"),
        ("pkg:leaf", "module"),
        ("pkg.leaf:fast", "attribute"),
        ("pkg.leaf:Leaf.make", "staticmethod (n)"),
        ("pkg.leaf:Leaf.__init__", "dataclass (x, y=3)"),
        ("pkg.leaf:Leaf.width", "property"),
        ("pkg.leaf:Leaf.size", "attribute"),
        ("pkg.leaf:Leaf.depth", None),
        ("pkg.leaf:twig", None),
        ("pkg.branch:twig", None),
    ],
)
def test_shapes_are_read_from_source(tmp_path, symbol, shape):
    root = tmp_path / "pkg"
    root.mkdir()
    for name, text in SOURCE.items():
        (root / name).write_text(text)
    assert Sources(root).describe(symbol) == shape
