"""What a head is: its kind, its sizes and its conventions, from its files alone."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from vllm_eagle3.heads import conventions
from vllm_eagle3.heads.checkpoint import SPECULATORS, Checkpoint
from vllm_eagle3.heads.conventions import Finding
from vllm_eagle3.heads.files import TensorEntry
from vllm_eagle3.heads.target import TargetShape
from vllm_eagle3.heads.vocabulary import DraftVocabulary, read_vocabulary

EAGLE3, EAGLE31, EAGLE1, UNKNOWN = "EAGLE-3", "EAGLE-3.1", "EAGLE-1/EAGLE-2/HASS", "unknown"


@dataclass(frozen=True)
class HeadDescription:
    """A head in words and numbers.

    Attributes:
        kind: ``EAGLE3``, ``EAGLE31`` (a norm for each captured state), ``EAGLE1`` (one
            captured state; the three share their tensors) or ``UNKNOWN``.
        hidden_size: of the head's decoder layer.
        target_hidden_size: of each captured state, or None.
        num_captured: states of the target that ``fc`` takes, or None.
        num_layers: decoder layers that the head has tensors for.
        num_heads, num_kv_heads: from its config.
        vocab_size: of the target, as far as the head knows.
        vocabulary: the draft vocabulary.
        convention, rotary, norm_output, norm_before_residual: the conventions that tensors
            do not show.
        layers_entered: the captured layers as vLLM counts them, or None.
        fc_norm: one norm for each captured state before ``fc``.
        norm_before_fc: one norm over all captured states before ``fc``.
        dtype: of most parameters, safetensors' name.
        num_parameters, num_bytes: of all floating-point tensors, of all tensors.
        problems: contradictions between config and tensors.
    """

    checkpoint: Checkpoint
    kind: str
    hidden_size: int | None
    target_hidden_size: int | None
    num_captured: int | None
    num_layers: int
    num_heads: int | None
    num_kv_heads: int | None
    vocab_size: int | None
    vocabulary: DraftVocabulary
    convention: Finding[str]
    layers_entered: tuple[int, ...] | None
    rotary: Finding[float]
    norm_output: Finding[bool]
    norm_before_residual: Finding[bool]
    fc_norm: bool
    norm_before_fc: bool
    dtype: str
    num_parameters: int
    num_bytes: int
    problems: tuple[str, ...]


def describe(
    checkpoint: Checkpoint,
    target: TargetShape | None = None,
    *,
    layer_ids_convention: str | None = None,
    rope_theta: float | None = None,
    norm_output: str | None = None,
    norm_before_residual: bool | None = None,
) -> HeadDescription:
    """Read a head. The options settle what its files do not tell.

    Raises:
        ValueError: a file is truncated or missing.
    """
    entries, config = checkpoint.entries, checkpoint.model_config
    kind = _kind(checkpoint)
    fc = entries.get("fc.weight")
    hidden_size = fc.shape[0] if fc else config.get("hidden_size")
    ids = conventions.stored_layer_ids(checkpoint)
    target_hidden, captured = _fusion(checkpoint, kind, len(ids or ()))
    lm_head = entries.get("lm_head.weight")
    vocab_size = config.get("vocab_size") or (target.vocab_size if target else None)
    vocabulary = read_vocabulary(
        checkpoint.load("d2t", "t2d"), lm_head.shape[0] if lm_head else None, vocab_size or 0
    )
    convention = conventions.layer_convention(checkpoint, target, layer_ids_convention)
    weights = [e for name, e in entries.items() if name not in ("d2t", "t2d")]
    return HeadDescription(
        checkpoint=checkpoint,
        kind=kind,
        hidden_size=hidden_size,
        target_hidden_size=target_hidden,
        num_captured=captured,
        num_layers=_num_layers(checkpoint),
        num_heads=config.get("num_attention_heads"),
        num_kv_heads=config.get("num_key_value_heads", config.get("num_attention_heads")),
        vocab_size=vocabulary.target_size or vocab_size,
        vocabulary=vocabulary,
        convention=convention,
        layers_entered=conventions.layers_entered(checkpoint, target, convention.value),
        rotary=conventions.rotary_base(checkpoint, rope_theta),
        norm_output=conventions.norm_output(checkpoint, norm_output),
        norm_before_residual=conventions.norm_before_residual(checkpoint, norm_before_residual),
        fc_norm="fc_norm.0.weight" in entries,
        norm_before_fc="input_norm.weight" in entries,
        dtype=_commonest_dtype(weights),
        num_parameters=sum(_count(entry) for entry in weights),
        num_bytes=sum(entry.num_bytes for entry in entries.values()),
        problems=tuple(_problems(checkpoint, kind, captured, vocabulary)),
    )


def _kind(checkpoint: Checkpoint) -> str:
    entries = checkpoint.entries
    fc = entries.get("fc.weight")
    algorithm = checkpoint.config.get("speculators_model_type", "eagle3")
    if fc is None or algorithm not in ("eagle3", "eagle"):
        return UNKNOWN
    if any(name.endswith("hidden_norm.weight") for name in entries):
        if "fc.bias" in entries or "mask_hidden" in entries:
            return UNKNOWN
        return EAGLE31 if "fc_norm.0.weight" in entries else EAGLE3
    return EAGLE1 if fc.shape[1] == 2 * fc.shape[0] else UNKNOWN


def _fusion(checkpoint: Checkpoint, kind: str, num_ids: int) -> tuple[int | None, int | None]:
    """Hidden size and number of the captured states, out of ``fc``'s inputs."""
    if kind == UNKNOWN:
        return None, None
    inputs = checkpoint.entries["fc.weight"].shape[1]
    if kind == EAGLE1:
        return inputs // 2, 1
    captured = checkpoint.model_config.get("num_aux_hidden_states") or num_ids or 3
    return inputs // captured, captured


def _num_layers(checkpoint: Checkpoint) -> int:
    names = (re.match(r"midlayer|layers\.\d+", name) for name in checkpoint.entries)
    return len({name[0] for name in names if name})


def _problems(
    checkpoint: Checkpoint, kind: str, captured: int | None, vocabulary: DraftVocabulary
) -> list[str]:
    entries, config = checkpoint.entries, checkpoint.model_config
    problems = [vocabulary.problem] if vocabulary.problem and kind != EAGLE1 else []
    if kind not in (EAGLE3, EAGLE31):
        return problems
    inputs, hidden = entries["fc.weight"].shape[1], entries["fc.weight"].shape[0]
    if captured and inputs % captured:
        problems.append(f"fc.weight takes {inputs} inputs, no multiple of {captured} states")
    if config.get("hidden_size", hidden) != hidden:
        problems.append(f"hidden_size={config['hidden_size']}, but fc.weight makes {hidden}")
    layers = _num_layers(checkpoint)
    if config.get("num_hidden_layers", layers) != layers:
        problems.append(f"num_hidden_layers={config['num_hidden_layers']}, but tensors of {layers}")
    if "lm_head.weight" not in entries:
        problems.append("no lm_head.weight")
    stored = checkpoint.config.get("draft_vocab_size")
    if vocabulary.size is not None and stored not in (None, vocabulary.size):
        problems.append(f"draft_vocab_size={stored}, but lm_head.weight has {vocabulary.size} rows")
    for flag, tensor in (("fc_norm", "fc_norm.0.weight"), ("norm_before_fc", "input_norm.weight")):
        if bool(checkpoint.flag(flag)) != (tensor in entries):
            problems.append(f"{flag}={checkpoint.flag(flag)}, but tensor {tensor} says otherwise")
    if checkpoint.layout == SPECULATORS and not config:
        problems.append("no transformer_layer_config")
    return problems


def _commonest_dtype(weights: list[TensorEntry]) -> str:
    counts: Counter[str] = Counter()
    for entry in weights:
        counts[entry.dtype] += _count(entry)
    return counts.most_common(1)[0][0] if counts else "none"


def _count(entry: TensorEntry) -> int:
    count = 1
    for length in entry.shape:
        count *= length
    return count


def as_dict(description: HeadDescription) -> dict[str, Any]:
    """For JSON."""

    def finding(item: Finding[Any]) -> dict[str, Any]:
        return {"stored": item.stored, "value": item.value, "reason": item.reason}

    plain = {
        name: value
        for name, value in vars(description).items()
        if isinstance(value, int | str | tuple | type(None))
    }
    return {
        "path": str(description.checkpoint.path),
        "layout": description.checkpoint.layout,
        **plain,
        "vocabulary": vars(description.vocabulary),
        **{
            name: finding(getattr(description, name))
            for name in ("convention", "rotary", "norm_output", "norm_before_residual")
        },
    }
