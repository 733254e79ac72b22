"""Checks of a head's files before an engine is built on them."""

from pathlib import Path

from vllm_eagle3.heads.checkpoint import Checkpoint
from vllm_eagle3.heads.description import HeadDescription, describe
from vllm_eagle3.heads.serving import misfits, serving, unread_layers, wrong_sizes
from vllm_eagle3.heads.target import TargetShape

METHODS = ("eagle3", "eagle")  # vLLM's, of the heads that grow trees


def check_files(path: str | None, method: str) -> HeadDescription | None:
    """Check that a local head is complete and of the kind that the method serves.

    Args:
        path: the speculative config's ``model``. A name that is not a local path is left
            to vLLM, which downloads it.
        method: the speculative config's, one of ``METHODS``.

    Returns:
        What the head is, or None of a name.

    Raises:
        ValueError: no such directory, no weights, a truncated file, or tensors that are
            another kind of head's.
    """
    if not path:
        raise ValueError('tree needs "model" in the speculative config: the EAGLE head to load')
    root = Path(path).expanduser()
    if not root.is_dir():
        if root.is_absolute() or path.startswith(("./", "../", "~")):
            raise ValueError(f"speculative model {path}: no such directory")
        return None
    description = describe(Checkpoint.open(root))
    right_method = serving(description).method
    if right_method is None:
        raise ValueError(
            f"speculative model {path} is not an EAGLE-3 head (fc.weight without a bias, and "
            "hidden_norm.weight) and not an EAGLE-1 head (fc.weight with twice as many inputs as "
            "outputs): trees serve these two"
        )
    if method != right_method:
        raise ValueError(
            f"speculative model {path} is an {description.kind} head: set "
            f'"method": "{right_method}" in the speculative config'
        )
    return description


def check_target(description: HeadDescription, target: TargetShape) -> None:
    """Check that a head grows trees for this target.

    Raises:
        ValueError: it was trained for another hidden size or vocabulary, captures other layers
            than vLLM would, or is no head that vLLM loads.
    """
    name = f"speculative model {description.checkpoint.path}"
    _refuse(name, misfits(description, target))
    verdict = serving(description, target)
    if not verdict.tree:
        raise ValueError(f"{name} cannot draft trees: {'; '.join(verdict.refusals)}")
    if unread := unread_layers(description, target):
        raise ValueError(f"{name}: {unread}")


def check_sizes(path: str, hidden_size: int, vocab_size: int, target: TargetShape) -> None:
    """Check what the config tells of a head whose weights are not here yet.

    Args:
        path: the speculative config's ``model``.
        hidden_size: of the target's states that the head takes.
        vocab_size: of the target.

    Raises:
        ValueError: it was trained for another hidden size or vocabulary.
    """
    _refuse(f"speculative model {path}", wrong_sizes(hidden_size, vocab_size, target))


def _refuse(name: str, found: list[str]) -> None:
    if found:
        raise ValueError(f"{name} is {'; '.join(found)}: use the head of this target")
