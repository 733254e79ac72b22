"""The contract with vLLM: every private name the plugin touches, and its recorded shape.

vLLM promises nothing about these names, so each supported version has its record in
``signatures/``. Both recording and checking read vLLM's source files and import nothing: the
same code serves the doctor on a machine where vLLM cannot be imported, the activation of a
tree, and the record of a version that is only unpacked somewhere.

    python -m vllm_eagle3.engine.contract --record PATH_TO_VLLM
"""

import argparse
import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vllm_eagle3.engine.ledger import TOUCHED, Hook
from vllm_eagle3.engine.sources import Sources

SUPPORTED = ("0.32", "0.33")
REMEDY = "install a vLLM that is supported: pip install 'vllm>=0.32,<0.34'"
_RECORDS = Path(__file__).parent / "signatures"


class ContractError(RuntimeError):
    """The installed vLLM is not one that the plugin knows how to drive."""


@dataclass(frozen=True)
class Mismatch:
    """A touched name whose shape in the installed vLLM is not the recorded one.

    Attributes:
        hook: where the plugin uses it.
        symbol: ``module:qualified.name``.
        expected: the recorded shape.
        found: the installed one; ``None`` if the name is gone.
    """

    hook: Hook
    symbol: str
    expected: str
    found: str | None

    def __str__(self) -> str:
        return f"{self.symbol} is {self.found or 'missing'}, expected {self.expected}"


def installed_root() -> Path | None:
    """The folder of the installed ``vllm`` package; ``None`` without one. Imports nothing."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def version_of(root: Path) -> str:
    """The version that a ``vllm`` folder was built as, such as ``0.32.0``.

    Raises:
        ContractError: the folder does not say.
    """
    path = root / "_version.py"
    match = path.is_file() and re.search(
        r"^__version__ = version = '([^']+)'", path.read_text(), re.MULTILINE
    )
    if not match:
        raise ContractError(f"the version of vLLM is not recorded in {path}: {REMEDY}")
    return match[1]


def minor_of(version: str) -> str:
    """``0.32`` of ``0.32.0`` or ``0.32.1+cu130``."""
    return ".".join(version.split(".")[:2])


def read_record(version: str) -> dict[str, str]:
    """The recorded shapes, by symbol, that a vLLM of this version must have.

    Raises:
        ContractError: the version is not supported.
    """
    minor = minor_of(version)
    if minor not in SUPPORTED:
        raise ContractError(
            f"vLLM {version} is not supported by draft trees, which know "
            f"{' and '.join(f'{minor}.x' for minor in SUPPORTED)}: {REMEDY}"
        )
    return json.loads((_RECORDS / f"{minor}.json").read_text())["symbols"]


def compare(root: Path) -> list[Mismatch]:
    """Where the ``vllm`` package in ``root`` departs from the record of its version."""
    expected = read_record(version_of(root))
    sources = Sources(root)
    mismatches = []
    for hook, symbols in TOUCHED.items():
        for symbol in symbols:
            found = sources.describe(symbol)
            if found != expected.get(symbol):
                recorded = expected.get(symbol, "absent from the record")
                mismatches.append(Mismatch(hook, symbol, recorded, found))
    return mismatches


def check() -> str:
    """The installed vLLM's version, if the plugin can drive it.

    Raises:
        ContractError: vLLM is missing, of an unsupported version, or has a touched name of
            another shape; the message names each and the version.
    """
    root = installed_root()
    if root is None:
        raise ContractError(f"vLLM is not installed: {REMEDY}")
    version = version_of(root)
    if mismatches := compare(root):
        listed = "; ".join(map(str, mismatches))
        raise ContractError(f"draft trees do not fit this vLLM {version}: {listed}. {REMEDY}")
    return version


def record(root: Path) -> Path:
    """Write the shapes of the ``vllm`` package in ``root`` as the record of its version.

    Raises:
        ContractError: a touched name is not there.
    """
    sources = Sources(root)
    symbols = {}
    for symbol in sorted({symbol for symbols in TOUCHED.values() for symbol in symbols}):
        shape = sources.describe(symbol)
        if shape is None:
            raise ContractError(f"{symbol} is not in {root}: correct engine/ledger.py")
        symbols[symbol] = shape
    version = version_of(root)
    path = _RECORDS / f"{minor_of(version)}.json"
    path.write_text(json.dumps({"version": version, "symbols": symbols}, indent=1) + "\n")
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vllm_eagle3.engine.contract")
    parser.add_argument(
        "--record", type=Path, required=True, metavar="PATH_TO_VLLM", help="a folder named vllm"
    )
    args = parser.parse_args(argv)
    print(record(args.record))


if __name__ == "__main__":
    main()
