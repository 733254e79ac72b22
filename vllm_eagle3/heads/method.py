"""The speculative method by which vLLM serves a head."""

from pathlib import Path

from vllm_eagle3.heads.checkpoint import Checkpoint
from vllm_eagle3.heads.description import describe
from vllm_eagle3.heads.serving import serving


def is_local(model: str | Path) -> bool:
    """Whether a model is a folder here; else it is a name that vLLM downloads, ``owner/name``.

    Raises:
        ValueError: a path, or a name in a folder that is here, at which there is no folder.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return True
    parts = path.parts
    is_path = path.is_absolute() or str(model).startswith((".", "~")) or len(parts) > 2
    if is_path:
        raise ValueError(f"{model}: no such folder")
    if len(parts) == 2 and path.parent.is_dir():
        raise ValueError(
            f"{model}: no such folder in {path.parent}; to download a model of this name, run"
            f" where no folder {path.parent} is"
        )
    return False


def method_of(head: str | Path) -> str:
    """vLLM's speculative method for a head, ``"eagle3"`` or ``"eagle"``.

    A name that vLLM downloads cannot be read here: it counts as an EAGLE-3 head's.

    Raises:
        ValueError: a folder that holds no EAGLE head, or a path at which there is none.
    """
    if not is_local(head):
        return "eagle3"
    verdict = serving(describe(Checkpoint.open(head)))
    if verdict.method is None:
        raise ValueError(f"{head}: {'; '.join(verdict.refusals)}")
    return verdict.method
