"""How a head will be served: as a tree by this plugin, as a chain by vLLM, or not."""

from dataclasses import dataclass

from vllm_eagle3.heads.checkpoint import EAGLE_REPOSITORY, SPECULATORS
from vllm_eagle3.heads.conventions import ENTERED, LLAMA_ROPE_THETA
from vllm_eagle3.heads.description import EAGLE1, UNKNOWN, HeadDescription
from vllm_eagle3.heads.target import TargetShape, rope_theta

_CONVERT = "convert it with `vllm-eagle3 convert-head`"


@dataclass(frozen=True)
class Serving:
    """The verdict.

    Attributes:
        method: vLLM's speculative method, or None.
        chain: vLLM loads it as a chain.
        tree: this plugin serves it as a tree.
        refusals: why not, for whichever is False.
        warnings: it loads, but may draft badly.
    """

    method: str | None
    chain: bool
    tree: bool
    refusals: tuple[str, ...]
    warnings: tuple[str, ...]


def serving(description: HeadDescription, target: TargetShape | None = None) -> Serving:
    """How vLLM and this plugin serve a head as it lies on disk."""
    if description.kind == UNKNOWN:
        return Serving(
            None, False, False, ("no EAGLE head: fc.weight or the norms do not match",), ()
        )
    refusals = [*description.problems, *misfits(description, target)]
    if description.kind == EAGLE1:
        if "fc.bias" in description.checkpoint.entries:
            refusals.append("vLLM's EAGLE-1 has no bias in fc, this head has fc.bias")
        chain = not refusals
        refusals.append("trees need an EAGLE-3 head")
        return Serving("eagle", chain, False, tuple(refusals), ())
    chain = not refusals
    if description.num_captured != 3:
        refusals.append(f"trees need three captured states, fc takes {description.num_captured}")
    if description.num_layers != 1:
        refusals.append(f"trees need a head of one layer, this one has {description.num_layers}")
    return Serving("eagle3", chain, not refusals, tuple(refusals), tuple(_warnings(description)))


def misfits(description: HeadDescription, target: TargetShape | None) -> list[str]:
    """Why a head does not fit a target; empty if it does or without a target."""
    if target is None:
        return []
    found = []
    if description.target_hidden_size not in (None, target.hidden_size):
        found.append(
            f"made for a target of hidden size {description.target_hidden_size}, "
            f"{target.name} has {target.hidden_size}"
        )
    if description.vocab_size not in (None, target.vocab_size):
        found.append(
            f"made for a vocabulary of {description.vocab_size} tokens, "
            f"{target.name} has {target.vocab_size}"
        )
    layers = description.layers_entered or ()
    if description.num_captured != 1 and any(not 0 <= e <= target.num_layers for e in layers):
        found.append(f"captures layers {list(layers)}, {target.name} has {target.num_layers}")
    return found


def _warnings(description: HeadDescription) -> list[str]:
    found = []
    convention, rotary = description.convention, description.rotary
    if convention.stored is not None and convention.value != ENTERED:
        found.append(
            f"vLLM reads the layer ids {list(convention.stored)} as layers entered; "
            + (
                f"these count the layer left, so it would capture one too early: {_CONVERT}"
                if convention.value
                else f"whether they are cannot be told: {convention.reason}"
            )
        )
    elif convention.stored is not None and description.checkpoint.layout != SPECULATORS:
        found.append(
            "SGLang reads layer ids as layers left and would capture one too late: convert-head "
            "leaves ids out where they are the default of both"
        )
    if description.norm_output.value is None:
        found.append(description.norm_output.reason)
    if description.norm_before_residual.value is None:
        found.append(description.norm_before_residual.reason)
    served = rope_theta(description.checkpoint.model_config) or LLAMA_ROPE_THETA
    if rotary.value != served:
        found.append(f"vLLM takes the rotary base {served:g}: {rotary.reason}")
    if description.checkpoint.layout == EAGLE_REPOSITORY:
        found.append(f"SGLang does not know this architecture's name: {_CONVERT}")
    return found
