"""The command ``vllm-eagle3 convert-head``: a head from one public layout to another."""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eagle3.files import replacing, writing
from vllm_eagle3.heads import conventions
from vllm_eagle3.heads.checkpoint import Checkpoint
from vllm_eagle3.heads.description import EAGLE3, EAGLE31, HeadDescription, describe
from vllm_eagle3.heads.files import read_entries, safetensors_files
from vllm_eagle3.heads.flat import flat_config, flat_name
from vllm_eagle3.heads.serving import misfits
from vllm_eagle3.heads.speculators import speculators_config, speculators_name
from vllm_eagle3.heads.target import TargetShape
from vllm_eagle3.heads.vocabulary import as_offsets

if TYPE_CHECKING:
    import torch

_TOP = ("fc.weight", "norm.weight", "lm_head.weight", "input_norm.weight", "embed_tokens.weight")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-eagle3 convert-head``."""
    parser.add_argument("source", metavar="SRC", help="folder of the head")
    parser.add_argument("out_dir", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--target", metavar="DIR", required=True, help="folder of its target")
    parser.add_argument(
        "--to",
        choices=("flat", "speculators"),
        default="flat",
        help="flat (vLLM, SGLang) or speculators; default flat",
    )
    parser.add_argument(
        "--target-name",
        metavar="NAME",
        help="the target's name in a speculators config (default: --target as given)",
    )
    parser.add_argument(
        "--layer-ids-convention",
        choices=(conventions.ENTERED, conventions.LEFT),
        help="what SRC's layer ids count, where that cannot be told",
    )
    parser.add_argument(
        "--rope-theta", type=float, metavar="X", help="the rotary base the head was trained with"
    )
    parser.add_argument(
        "--norm-output",
        choices=(conventions.FED_BACK, conventions.BEFORE_HEAD),
        help="what norm_output=true means in SRC",
    )
    parser.add_argument(
        "--norm-before-residual",
        choices=("yes", "no"),
        help="whether SRC's residual starts after hidden_norm",
    )


def run(args: argparse.Namespace) -> None:
    """The command ``vllm-eagle3 convert-head``."""
    residual = None if args.norm_before_residual is None else args.norm_before_residual == "yes"
    head = convert(
        args.source,
        args.out_dir,
        args.target,
        to=args.to,
        target_name=args.target_name,
        layer_ids_convention=args.layer_ids_convention,
        rope_theta=args.rope_theta,
        norm_output=args.norm_output,
        norm_before_residual=residual,
    )
    entered = ", ".join(map(str, head.layers_entered or ()))
    print(f"{head.kind}, {head.checkpoint.layout} layout")
    print(f"captured layers  entered {entered} ({head.convention.reason})")
    print(f"rotary base      {head.rotary.value:g} ({head.rotary.reason})")
    print(f"norm_output      {head.norm_output.value} ({head.norm_output.reason})")
    print(f"wrote {args.out_dir} ({args.to})")


def convert(
    source: str | Path,
    out_dir: str | Path,
    target: str | Path,
    *,
    to: str = "flat",
    target_name: str | None = None,
    **settled: Any,
) -> HeadDescription:
    """Write a head in another layout. Weights keep their values and types.

    Args:
        source: an EAGLE-3 head of the EAGLE repository, SpecForge, this project or
            speculators.
        out_dir: created; must not hold a head yet.
        target: directory of its target, read for its sizes.
        to: ``"flat"`` or ``"speculators"``.
        target_name: for the speculators config; the default is ``target`` as given.
        settled: what the files may leave open, as :func:`describe` takes it.

    Returns:
        What the source is.

    Raises:
        ValueError: the source is no EAGLE-3 head, contradicts itself or does not fit the
            target, a convention cannot be told (the message names the option), or
            ``out_dir`` holds a head already or cannot be written.
    """
    out_dir, shape = Path(out_dir), TargetShape.read(target)
    if (out_dir / "config.json").exists():
        raise ValueError(f"{out_dir} holds a checkpoint already: give another OUT")
    head = describe(Checkpoint.open(source), shape, **settled)
    if head.kind not in (EAGLE3, EAGLE31):
        raise ValueError(f"{source} is not an EAGLE-3 head ({head.kind}): only those are converted")
    faults = [*head.problems, *misfits(head, shape)]
    if faults:
        raise ValueError(f"{source}: {'; '.join(faults)}")
    if to == "speculators":
        config = speculators_config(head, shape, target_name or str(target))
        rename: Callable[[str], str] = speculators_name
    else:
        config, rename = flat_config(head, shape), flat_name
    _write(out_dir, config, {rename(n): t for n, t in _tensors(head, shape, Path(target))})
    return head


def _tensors(
    head: HeadDescription, target: TargetShape, target_dir: Path
) -> "Iterator[tuple[str, torch.Tensor]]":
    """The head's tensors by their flat names, maps as offsets."""
    stored = {flat_name(name): tensor for name, tensor in head.checkpoint.load().items()}
    vocabulary = {name: stored.pop(name) for name in ("d2t", "t2d") if name in stored}
    # EAGLE's trainer keeps the target's own copy of the embedding in the head.
    embedding = stored.get("embed_tokens.weight")
    if embedding is not None and _is_targets(embedding, target_dir):
        del stored["embed_tokens.weight"]
    for name, tensor in stored.items():
        if name not in _TOP and not name.startswith(("midlayer.", "layers.", "fc_norm.")):
            raise ValueError(
                f"{head.checkpoint.path}: tensor {name!r} is none of an EAGLE-3 head's"
            )
        yield name, tensor.contiguous()
    yield from as_offsets(vocabulary, head.vocabulary, target.vocab_size).items()


def _is_targets(embedding: "torch.Tensor", target_dir: Path) -> bool:
    """Whether the target's embedding, rounded to the head's type, is this one."""
    from safetensors import safe_open

    for file in safetensors_files(target_dir):
        for name in read_entries(file):
            if name.endswith("embed_tokens.weight"):
                with safe_open(file, framework="pt") as reader:
                    return bool(reader.get_tensor(name).to(embedding.dtype).equal(embedding))
    return False


def _write(out_dir: Path, config: dict[str, Any], tensors: "dict[str, torch.Tensor]") -> None:
    from safetensors.torch import save_file

    remedy = "free some space, or give another OUT"
    with writing(out_dir, remedy):
        out_dir.mkdir(parents=True, exist_ok=True)
        with replacing(out_dir / "model.safetensors", remedy) as scratch:
            save_file(tensors, scratch, metadata={"format": "pt"})
        # Last: a folder without a config is no head, so an interrupted conversion is none either.
        (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
