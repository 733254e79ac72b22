"""A head's draft vocabulary: the tensors ``d2t`` and ``t2d``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

FULL, OFFSETS, IDS = "the whole target vocabulary", "offsets", "target ids"


@dataclass(frozen=True)
class DraftVocabulary:
    """How draft ids map to target ids.

    Attributes:
        form: ``FULL`` (no map), ``OFFSETS`` (target id = d + d2t[d], what vLLM and SGLang
            read), ``IDS`` (d2t holds the target ids themselves), or None if it has no
            consistent reading.
        size: rows of the head's output (Vd), or None if the target's output is used.
        target_size: entries of ``t2d``, or None without it.
        problem: what is wrong, or "".
    """

    form: str | None
    size: int | None
    target_size: int | None
    problem: str = ""


def read_vocabulary(tensors: "Tensors", size: int | None, vocab_size: int) -> DraftVocabulary:
    """Find the form in which both maps agree.

    Args:
        tensors: with ``d2t`` (integers [Vd]) and ``t2d`` (bool [V]) where the head has them.
        size: rows of ``lm_head.weight``, or None.
        vocab_size: of the target, for heads without ``t2d``.
    """
    d2t, t2d = tensors.get("d2t"), tensors.get("t2d")
    target_size = None if t2d is None else len(t2d)

    def found(form: str | None, problem: str = "") -> DraftVocabulary:
        return DraftVocabulary(form, size, target_size, problem)

    if d2t is None:
        if size in (None, vocab_size):
            return found(FULL)
        return found(None, f"{size} draft tokens without d2t: their target ids are unknown")
    if size is not None and len(d2t) != size:
        return found(None, f"d2t has {len(d2t)} entries, lm_head.weight {size} rows")
    limit = vocab_size if target_size is None else target_size
    readings = {OFFSETS: target_ids(d2t, OFFSETS), IDS: target_ids(d2t, IDS)}
    fitting = [form for form, ids in readings.items() if _fits(ids, t2d, limit)]
    if len(fitting) == 1:
        return found(fitting[0])
    if fitting:
        return found(None, "d2t may hold offsets or target ids; t2d, which would tell, is missing")
    how = "in [0, V)" if t2d is None else "those that t2d marks"
    return found(None, f"d2t names no set of different target ids {how}: the maps contradict")


def target_ids(d2t: "torch.Tensor", form: str) -> "torch.Tensor":
    """The target id of each draft id, int64 [Vd]."""
    import torch

    return d2t.long() + torch.arange(len(d2t)) if form == OFFSETS else d2t.long()


def as_offsets(tensors: "Tensors", vocabulary: DraftVocabulary, vocab_size: int) -> "Tensors":
    """``d2t`` (int64 offsets [Vd]) and ``t2d`` (bool [V]) as vLLM and SGLang read them.

    A head over the whole vocabulary has neither. ``t2d`` is made where it is missing.

    Raises:
        ValueError: the maps have no consistent reading.
    """
    import torch

    if vocabulary.form is None:
        raise ValueError(f"the draft vocabulary cannot be read: {vocabulary.problem}")
    if vocabulary.form == FULL:
        return {}
    ids = target_ids(tensors["d2t"], vocabulary.form)
    marks = torch.zeros(vocabulary.target_size or vocab_size, dtype=torch.bool)
    marks[ids] = True
    return {"d2t": ids - torch.arange(len(ids)), "t2d": marks}


def _fits(ids: "torch.Tensor", t2d: "torch.Tensor | None", limit: int) -> bool:
    distinct = ids.unique()
    if len(distinct) != len(ids) or int(distinct[0]) < 0 or int(distinct[-1]) >= limit:
        return False
    return t2d is None or bool(t2d.bool().nonzero()[:, 0].equal(distinct))
