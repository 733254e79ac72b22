"""How a head will be served: as a tree by this plugin, as a chain by vLLM, or not."""

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_eagle3.heads.checkpoint import EAGLE_REPOSITORY, SPECULATORS, unread_switches
from vllm_eagle3.heads.conventions import ENTERED, LAYER_IDS, LLAMA_ROPE_THETA
from vllm_eagle3.heads.description import EAGLE1, UNKNOWN, HeadDescription
from vllm_eagle3.heads.target import TargetShape, rope_theta

_CONVERT = "convert it with `vllm-eagle3 convert-head`"
_UNREAD = "vLLM looks for layer ids at the top of config.json, where there are none, and captures"


@dataclass(frozen=True)
class Serving:
    """The verdict.

    Attributes:
        method: vLLM's speculative method, or None.
        chain: vLLM loads it as a chain.
        tree: this plugin serves it as a tree.
        refusals: why not, for whichever is False.
        warnings: vLLM loads it, but it may draft badly.
        notes: what SGLang makes of the same files.
    """

    method: str | None
    chain: bool
    tree: bool
    refusals: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def serving(description: HeadDescription, target: TargetShape | None = None) -> Serving:
    """How vLLM and this plugin serve a head as it lies on disk."""
    if description.kind == UNKNOWN:
        refusal = "no EAGLE head: fc.weight or the norms do not match"
        return Serving(None, False, False, (refusal,))
    is_eagle1 = description.kind == EAGLE1
    refusals = [*description.problems, *misfits(description, target)]
    if is_eagle1 and "fc.bias" in description.checkpoint.entries:
        refusals.append("vLLM's EAGLE-1 has no bias in fc, this head has fc.bias")
    if not is_eagle1 and _captures_by_default(description) and description.num_captured != 3:
        refusals.append(f"{_UNREAD} three layers, fc takes {description.num_captured}: {_CONVERT}")
    if not is_eagle1:
        refusals += [
            f"{name} stands in eagle_config, where vLLM does not look: {_CONVERT}"
            for name in unread_switches(description.checkpoint.config)
        ]
    chain = not refusals
    if description.num_layers != 1:
        refusals.append(f"trees need a head of one layer, this one has {description.num_layers}")
    return Serving(
        "eagle" if is_eagle1 else "eagle3",
        chain,
        not refusals,
        tuple(refusals),
        () if is_eagle1 else tuple(_warnings(description, target)),
        () if is_eagle1 else tuple(_notes(description)),
    )


def misfits(description: HeadDescription, target: TargetShape | None) -> list[str]:
    """Why a head does not fit a target; empty if it does or without a target."""
    if target is None:
        return []
    found = wrong_sizes(description.target_hidden_size, description.vocab_size, target)
    layers = description.layers_entered or ()
    outside = any(not 0 <= e <= target.num_layers for e in layers)
    if description.num_captured != 1 and (outside or len(set(layers)) < len(layers)):
        found.append(
            f"made for layers {list(layers)}: in the {target.num_layers} of {target.name} these "
            "are not as many different ones"
        )
    return found


def wrong_sizes(
    target_hidden_size: int | None, vocab_size: int | None, target: TargetShape
) -> list[str]:
    """Why a head of these sizes does not fit a target; a size that is not known (None) fits.

    Args:
        target_hidden_size: of each state that the head takes from its target.
        vocab_size: of its target.
    """
    found = []
    if target_hidden_size not in (None, target.hidden_size):
        found.append(
            f"made for a target of hidden size {target_hidden_size}, "
            f"{target.name} has {target.hidden_size}"
        )
    if vocab_size not in (None, target.vocab_size):
        found.append(
            f"made for a vocabulary of {vocab_size} tokens, {target.name} has {target.vocab_size}"
        )
    return found


def _captures_by_default(description: HeadDescription) -> bool:
    """Whether vLLM's runner captures 2, L//2 and L-3, whatever ids the head has."""
    return LAYER_IDS not in description.checkpoint.config


def unread_layers(description: HeadDescription, target: TargetShape) -> str:
    """How vLLM captures other layers than an EAGLE-3 head names; "" if it does not."""
    entered, captured = description.layers_entered, target.default_layers
    if description.kind == EAGLE1 or not _captures_by_default(description):
        return ""
    if entered in (None, captured):
        return ""
    return f"{_UNREAD} {list(captured)}, not {list(entered)}: {_CONVERT}"


def _layer_warnings(description: HeadDescription, target: TargetShape | None) -> Iterator[str]:
    convention = description.convention
    if convention.stored is None:
        return
    ids = list(convention.stored)
    if _captures_by_default(description):
        if description.layers_entered is None:
            yield f"{_UNREAD} 2, L//2 and L-3; is that {ids}? {convention.reason}"
        elif target is not None and (unread := unread_layers(description, target)):
            yield unread
    elif convention.value is None:
        yield (
            f"vLLM reads the layer ids {ids} as layers entered; whether they are cannot be told: "
            + convention.reason
        )
    elif convention.value != ENTERED:
        yield (
            f"vLLM reads the layer ids {ids} as layers entered; these count the layer left, so it "
            f"would capture one too early: {_CONVERT}"
        )


def _warnings(description: HeadDescription, target: TargetShape | None) -> Iterator[str]:
    yield from _layer_warnings(description, target)
    if description.norm_output.value is None:
        yield description.norm_output.reason
    if description.norm_before_residual.value is None:
        yield description.norm_before_residual.reason
    served = rope_theta(description.checkpoint.model_config) or LLAMA_ROPE_THETA
    if description.rotary.value != served:
        yield f"vLLM takes the rotary base {served:g}: {description.rotary.reason}"


def _notes(description: HeadDescription) -> Iterator[str]:
    convention = description.convention
    stored_as_entered = convention.stored is not None and convention.value == ENTERED
    if stored_as_entered and description.checkpoint.layout != SPECULATORS:
        yield (
            "SGLang reads layer ids as layers left and would capture one too late: convert-head "
            "leaves ids out where they are the default of both"
        )
    if description.checkpoint.layout == EAGLE_REPOSITORY:
        yield f"SGLang does not know this architecture's name: {_CONVERT}"
