"""The command ``vllm-eagle3 inspect``: what a head is and how it will be served."""

import argparse
import json
from collections.abc import Iterator

from vllm_eagle3.heads.checkpoint import Checkpoint
from vllm_eagle3.heads.conventions import Finding
from vllm_eagle3.heads.description import EAGLE1, UNKNOWN, HeadDescription, as_dict, describe
from vllm_eagle3.heads.serving import Serving, misfits, serving
from vllm_eagle3.heads.target import TargetShape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-eagle3 inspect``."""
    parser.add_argument("head", metavar="HEAD", help="folder of the head")
    parser.add_argument("--target", metavar="DIR", help="folder of the target: does the head fit?")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """The command ``vllm-eagle3 inspect``: 0 if vLLM can serve the head, else 1."""
    target = TargetShape.read(args.target) if args.target else None
    description = describe(Checkpoint.open(args.head), target)
    verdict = serving(description, target)
    if args.json:
        content = as_dict(description) | {"serving": vars(verdict)}
        if target is not None:
            content["fits_target"] = not misfits(description, target)
        print(json.dumps(content, indent=2))
    else:
        print("\n".join(report(description, verdict, target)))
    return 0 if verdict.chain else 1


def report(
    description: HeadDescription, verdict: Serving, target: TargetShape | None
) -> Iterator[str]:
    """The lines of the text; of something else than a head why it is none."""
    if description.kind == UNKNOWN:
        yield f"refused: {'; '.join(verdict.refusals)}"
        return
    for label, value in _rows(description):
        yield f"{label:20}{value}"
    if target is not None:
        misfit = misfits(description, target)
        fits = "no: " + "; ".join(misfit) if misfit else "hidden size and vocabulary fit"
        yield f"{'target':20}{target.name}: {fits}"
    yield ""
    chain = f'chain by vLLM ("method": "{verdict.method}")'
    yield f"  {'yes' if verdict.chain else 'no ':4}{chain}"
    yield f'  {"yes" if verdict.tree else "no ":4}tree by vllm-eagle3 ("tree": true)'
    for reason in verdict.refusals:
        yield f"      refused: {reason}"
    for warning in verdict.warnings:
        yield f"      warning: {warning}"
    for note in verdict.notes:
        yield f"      note: {note}"


def _rows(head: HeadDescription) -> Iterator[tuple[str, str]]:
    yield "kind", head.kind
    yield "layout", head.checkpoint.layout
    yield "hidden size", f"{head.hidden_size} (target {head.target_hidden_size})"
    yield "layers", f"{head.num_layers}, {head.num_heads} heads, {head.num_kv_heads} of keys"
    yield "draft vocabulary", _vocabulary(head)
    if head.kind == EAGLE1:
        yield "captured", "the target's last state"
    else:
        yield "captured layers", _layers(head)
    yield "norms", _norms(head)
    yield "rotary base", _finding(head.rotary, _number(head.rotary.value))
    size = f"{head.num_parameters / 1e6:.1f} M parameters, {head.num_bytes / 2**20:.1f} MiB"
    yield "weights", f"{head.dtype}, {size}"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def _finding(finding: Finding, value: str | None) -> str:
    return f"{value if value is not None else 'cannot be told'} ({finding.reason})"


def _vocabulary(head: HeadDescription) -> str:
    vocabulary = head.vocabulary
    if vocabulary.size is None:
        return f"the target's, {head.vocab_size} tokens"
    form = vocabulary.form or f"inconsistent: {vocabulary.problem}"
    marks = ", t2d agrees" if vocabulary.form and vocabulary.target_size else ""
    return f"{vocabulary.size} of {head.vocab_size} tokens (d2t: {form}{marks})"


def _layers(head: HeadDescription) -> str:
    stored = head.convention.stored
    if stored is None:
        entered = head.layers_entered
        return f"{'entered ' + _ids(entered) if entered else 'default'} ({head.convention.reason})"
    if head.layers_entered is None:
        return f"{_ids(stored)}, entered or left cannot be told ({head.convention.reason})"
    return f"entered {_ids(head.layers_entered)} (stored {_ids(stored)}: {head.convention.reason})"


def _ids(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))


def _norms(head: HeadDescription) -> str:
    fed_back = {True: "post-norm", False: "pre-norm", None: "cannot be told"}
    parts = [f"fed back: {fed_back[head.norm_output.value]}"]
    if head.fc_norm:
        parts.append("one for each captured state (fc_norm)")
    if head.norm_before_fc:
        parts.append("one before fc (norm_before_fc)")
    if head.norm_before_residual.value:
        parts.append("residual after hidden_norm (norm_before_residual)")
    return ", ".join(parts)
