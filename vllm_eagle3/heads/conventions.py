"""The conventions that a head's files leave open, told from evidence or asked for.

Three traps decide whether a head drafts at all, and none shows in a tensor's shape: the
number of a captured layer counts the layer *entered* (EAGLE, vLLM, speculators) or *left*
(SpecForge, and SGLang when it reads ids from a config); ``norm_output`` means that the
normed state is fed back (vLLM, speculators) or only that the state is normed before the
head's logits (SpecForge, where every head does that); and the EAGLE repository trains with
a rotary base of 10000 whatever the config says.
"""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from vllm_eagle3.heads.checkpoint import EAGLE_REPOSITORY, SPECULATORS, Checkpoint
from vllm_eagle3.heads.target import TargetShape, rope_theta

# vLLM's runner reads this key at the top of a config only; its EAGLE-3 head, and SGLang, in
# `eagle_config`.
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
ENTERED, LEFT = "entered", "left"
FED_BACK, BEFORE_HEAD = "fed-back", "before-head"
LLAMA_ROPE_THETA = 10000.0  # of EAGLE's trainer, and of a Llama config that names none

T = TypeVar("T")


@dataclass(frozen=True)
class Finding(Generic[T]):
    """One convention.

    Attributes:
        stored: what the config says, or None.
        value: what it means, or None if the files do not tell.
        reason: the evidence, or the option that settles it.
    """

    stored: Any
    value: T | None
    reason: str

    def require(self, what: str) -> T:
        """The value.

        Raises:
            ValueError: it cannot be told; the message names the option that settles it.
        """
        if self.value is None:
            raise ValueError(f"{what} cannot be told: {self.reason}")
        return self.value


def stored_layer_ids(checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """The numbers of the captured layers as written, or None."""
    ids = checkpoint.config.get(LAYER_IDS) or checkpoint.eagle_config.get(LAYER_IDS)
    return tuple(ids) if ids else None


def layer_convention(
    checkpoint: Checkpoint, target: TargetShape | None, asked: str | None = None
) -> Finding[str]:
    """Whether the captured layers are numbered as ``entered`` or ``left``."""
    ids = stored_layer_ids(checkpoint)
    if ids is None:
        return Finding(None, ENTERED, "no ids stored: every engine captures 2, L//2 and L-3")
    if asked is not None:
        return Finding(ids, asked, "as --layer-ids-convention says")
    if checkpoint.layout == SPECULATORS:
        return Finding(ids, ENTERED, "the speculators format counts the layer entered")
    if checkpoint.follows_our_conventions:
        return Finding(ids, ENTERED, "the config names vLLM's conventions")
    if target is None:
        return Finding(ids, None, "give --target: the number of its layers may tell")
    default = target.default_layers
    if ids == default:
        return Finding(ids, ENTERED, f"the ids are 2, L//2, L-3 of {target.num_layers} layers")
    if ids == tuple(layer - 1 for layer in default):
        return Finding(ids, LEFT, f"the ids are 1, L//2-1, L-4 of {target.num_layers} layers")
    return Finding(
        ids,
        None,
        f"the ids {list(ids)} are no trainer's default; give --layer-ids-convention entered "
        "(EAGLE, vLLM, speculators) or left (SpecForge)",
    )


def layers_entered(
    checkpoint: Checkpoint, target: TargetShape | None, convention: str | None
) -> tuple[int, ...] | None:
    """The captured layers as vLLM counts them, or None if that cannot be told."""
    ids = stored_layer_ids(checkpoint)
    if ids is None:
        return target.default_layers if target else None
    if convention is None:
        return None
    return tuple(layer + 1 for layer in ids) if convention == LEFT else ids


def rotary_base(checkpoint: Checkpoint, asked: float | None = None) -> Finding[float]:
    """The rotary base that the head was trained with."""
    stored = rope_theta(checkpoint.model_config)
    if asked is not None:
        return Finding(stored, float(asked), "as --rope-theta says")
    if checkpoint.layout == EAGLE_REPOSITORY:
        if stored not in (None, LLAMA_ROPE_THETA):
            return Finding(
                stored,
                None,
                f"the config says {stored:g}, but the EAGLE repository's trainer used 10000 "
                "whatever the config said; give --rope-theta",
            )
        return Finding(stored, LLAMA_ROPE_THETA, "the EAGLE repository's trainer used it always")
    if stored is None:
        return Finding(None, LLAMA_ROPE_THETA, "none stored: Llama's default, here as in training")
    if checkpoint.layout == SPECULATORS or checkpoint.follows_our_conventions:
        return Finding(stored, stored, "as stored: this layout's trainer reads it from the config")
    return Finding(
        stored,
        stored,
        "likely, as stored: SpecForge and vllm-eagle3 train with the config's base; a repackaged "
        "head of the EAGLE repository needs 10000 (--rope-theta)",
    )


def norm_output(checkpoint: Checkpoint, asked: str | None = None) -> Finding[bool]:
    """Whether the state fed to the next draft step is the normed one (EAGLE-3.1)."""
    stored = checkpoint.flag("norm_output")
    if not stored:
        return Finding(stored, False, "the state before the norm is fed back")
    if asked is not None:
        return Finding(stored, asked == FED_BACK, "as --norm-output says")
    if checkpoint.layout == SPECULATORS or checkpoint.follows_our_conventions:
        return Finding(stored, True, "the state after the norm is fed back")
    return Finding(
        stored,
        None,
        "norm_output=true: vLLM feeds the normed state back, SpecForge only norms before the "
        "logits; give --norm-output fed-back or before-head",
    )


def norm_before_residual(checkpoint: Checkpoint, asked: bool | None = None) -> Finding[bool]:
    """Whether the residual stream starts after ``hidden_norm`` (a speculators option)."""
    stored = checkpoint.flag("norm_before_residual")
    if asked is not None:
        return Finding(stored, asked, "as --norm-before-residual says")
    if stored is None and checkpoint.layout == SPECULATORS:
        return Finding(
            None,
            None,
            "norm_before_residual is not stored; vLLM takes true, speculators false: give "
            "--norm-before-residual yes or no",
        )
    return Finding(stored, bool(stored), "as stored" if stored is not None else "EAGLE-3's order")
