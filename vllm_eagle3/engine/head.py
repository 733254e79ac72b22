"""Checks of an EAGLE-3 head's files before an engine is built on them."""

from dataclasses import dataclass
from pathlib import Path

from vllm_eagle3.heads.files import read_entries, safetensors_files


@dataclass(frozen=True)
class HeadShapes:
    """What the tensors of a head say about the target it was trained for.

    Attributes:
        hidden_size: of the target (H), from ``fc.weight`` [H_draft, 3 * H].
        draft_vocab_size: rows of the head's ``lm_head.weight`` (Vd).
        target_vocab_size: entries of ``t2d``, or None where the head has none.
    """

    hidden_size: int
    draft_vocab_size: int
    target_vocab_size: int | None


def check_files(path: str | None) -> HeadShapes | None:
    """Check that a local head is complete and is an EAGLE-3 head.

    Args:
        path: the speculative config's ``model``. A name that is not a local path is left
            to vLLM, which downloads it.

    Returns:
        The head's shapes, or None if they cannot be read here.

    Raises:
        ValueError: no such directory, no weights, a truncated file, or tensors that are
            not an EAGLE-3 head's.
    """
    if not path:
        raise ValueError('tree needs "model" in the speculative config: the EAGLE-3 head to load')
    root = Path(path).expanduser()
    if not root.is_dir():
        if root.is_absolute() or path.startswith(("./", "../", "~")):
            raise ValueError(f"speculative model {path}: no such directory")
        return None
    if not (root / "config.json").is_file():
        raise ValueError(f"speculative model {path}: no config.json in it")
    files = safetensors_files(root)
    if not files:
        if any(root.glob("*.bin")) or any(root.glob("*.pt")):
            return None
        raise ValueError(f"speculative model {path}: no weights (*.safetensors) in it")
    return _shapes(
        path,
        {name: entry.shape for file in files for name, entry in read_entries(file).items()},
    )


def check_target(path: str, shapes: HeadShapes, hidden_size: int, vocab_size: int) -> None:
    """Check that a head was trained for a target of these sizes.

    Raises:
        ValueError: the hidden size or the vocabulary differs.
    """
    if shapes.hidden_size != hidden_size:
        raise ValueError(
            f"speculative model {path} was trained for a target of hidden size "
            f"{shapes.hidden_size}, this target has {hidden_size}: use the head of this target"
        )
    if shapes.target_vocab_size is not None and shapes.target_vocab_size != vocab_size:
        raise ValueError(
            f"speculative model {path} was trained for a vocabulary of {shapes.target_vocab_size}"
            f" tokens, this target has {vocab_size}: use the head of this target"
        )


def _shapes(path: str, tensors: dict[str, tuple[int, ...]]) -> HeadShapes:
    by_suffix = {name.removeprefix("model."): shape for name, shape in tensors.items()}
    fc = by_suffix.get("fc.weight")
    hidden_norm = [name for name in by_suffix if name.endswith("hidden_norm.weight")]
    if fc is None or not hidden_norm or "fc.bias" in by_suffix:
        raise ValueError(
            f"speculative model {path} is not an EAGLE-3 head (fc.weight without a bias and "
            "hidden_norm.weight expected): trees serve EAGLE-3 heads only"
        )
    if fc[1] % 3:
        raise ValueError(
            f"speculative model {path}: fc.weight takes {fc[1]} inputs, not three hidden states"
        )
    lm_head = by_suffix.get("lm_head.weight")
    if lm_head is None:
        raise ValueError(f"speculative model {path} has no lm_head.weight")
    t2d = by_suffix.get("t2d")
    return HeadShapes(fc[1] // 3, lm_head[0], t2d[0] if t2d else None)
