"""The speculative method by which vLLM serves a head."""

from pathlib import Path

from vllm_eagle3.heads.checkpoint import Checkpoint
from vllm_eagle3.heads.description import describe
from vllm_eagle3.heads.serving import serving


def method_of(head: str | Path) -> str:
    """vLLM's speculative method for a head, ``"eagle3"`` or ``"eagle"``.

    A name that vLLM downloads cannot be read here: it counts as an EAGLE-3 head's.

    Raises:
        ValueError: a folder that holds no EAGLE head.
    """
    if not Path(head).expanduser().is_dir():
        return "eagle3"
    verdict = serving(describe(Checkpoint.open(head)))
    if verdict.method is None:
        raise ValueError(f"{head}: {'; '.join(verdict.refusals)}")
    return verdict.method
