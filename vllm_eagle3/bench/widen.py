"""``vllm-eagle3 bench widen``: a small model's text at the cost of a large model.

A benchmark tool. Speculative decoding is measured with a target that drafts can predict and
that costs what people serve; where no such pair is at hand, this widens a small one:
SmolLM2-135M-Instruct and its head to the shape of Llama-3.1-8B. The wide pair computes the
same function (:mod:`vllm_eagle3.bench.widen_layout`), so it writes the same text with the same
acceptance. It is no better model than the small one.
"""

import argparse
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eagle3.bench.llama_shape import LLAMA_3_1_8B, LlamaShape
from vllm_eagle3.corpus import write_json
from vllm_eagle3.heads.checkpoint import CONVENTIONS_KEY, FLAT, OUR_CONVENTIONS, Checkpoint
from vllm_eagle3.heads.conventions import LAYER_IDS, layer_convention, layers_entered
from vllm_eagle3.heads.files import read_config, safetensors_files
from vllm_eagle3.heads.target import TargetShape

if TYPE_CHECKING:
    from vllm_eagle3.bench.widen_writer import Written

_HEAD_DIR = Path(__file__).parents[1] / "demo" / "head"
_DTYPES = ("bfloat16", "float32")
_TOKENIZER_AND_GENERATION = ("*token*.json", "vocab.json", "merges.txt", "*.jinja", "generation*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-eagle3 bench widen``."""
    add = parser.add_argument
    add("source", type=Path, help="the small target, as `convert-smollm2` writes it")
    add("out_dir", type=Path, help="new folder for target/ and head/ (15 GB in bfloat16)")
    add("--head", type=Path, default=_HEAD_DIR, help="its EAGLE-3 head (default: the one shipped)")
    add("--dtype", choices=_DTYPES, default="bfloat16")
    add("--seed", type=int, default=0, help="of the random numbers in free places")
    add("--device", help="where they are made (default: cuda if there is one)")


def run(args: argparse.Namespace) -> None:
    """The command ``vllm-eagle3 bench widen``."""
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    start = time.monotonic()
    made = widen(
        args.source, args.head, args.out_dir, dtype=args.dtype, seed=args.seed, device=device
    )
    for written in made:
        print(f"wrote {written.path}: {written.describe()}")
    print(f"{time.monotonic() - start:.0f} s. {purpose(args.source, LLAMA_3_1_8B)}")


def widen(
    source_dir: Path,
    head_dir: Path,
    out_dir: Path,
    shape: LlamaShape = LLAMA_3_1_8B,
    dtype: str = "bfloat16",
    seed: int = 0,
    device: str = "cpu",
) -> "tuple[Written, Written]":
    """Write ``out_dir/target`` and ``out_dir/head``, which compute what the sources compute.

    Args:
        source_dir: a Llama; its vocabulary, context length and tokenizer are kept.
        head_dir: an EAGLE-3 head for it, of one layer, in vLLM's flat layout.
        out_dir: new or empty.
        shape: of the wide target; the head gets the same with one layer. Norms are scaled by
            sqrt(source hidden size / hidden size), exact where that is a short binary number.
        dtype: of the weights, ``"bfloat16"`` or ``"float32"``.
        seed: with ``device`` it determines the random numbers.
        device: where tensors are made, one for each thread at a time.

    Returns:
        What was written: the target and the head.

    Raises:
        ValueError: the source is no plain Llama, the head is not for it or in another layout,
            ``shape`` cannot hold them, or ``out_dir`` is in use or has no room.
    """
    import torch

    from vllm_eagle3.bench.widen_layout import Layout
    from vllm_eagle3.bench.widen_writer import Writer

    source_dir, head_dir, out_dir = Path(source_dir), Path(head_dir), Path(out_dir)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}: use one of {', '.join(_DTYPES)}")
    target, head = _target_config(source_dir), _head_config(head_dir, source_dir)
    layouts = (
        Layout(LlamaShape.read(target), shape),
        Layout(LlamaShape.read(head), replace(shape, num_layers=1)),
    )
    if out_dir.exists() and any(out_dir.iterdir()):
        raise ValueError(f"{out_dir} is not empty: give a new folder")
    out_dir.mkdir(parents=True, exist_ok=True)
    writer = Writer(getattr(torch, dtype), seed, torch.device(device))
    _check_room(out_dir, target["vocab_size"], shape, writer.dtype.itemsize)

    wide_target = writer.write(layouts[0], source_dir, out_dir / "target")
    for pattern in _TOKENIZER_AND_GENERATION:
        for file in source_dir.glob(pattern):
            shutil.copyfile(file, wide_target.path / file.name)
    wide_head = writer.write(layouts[1], head_dir, out_dir / "head")
    for written, layout, config in zip(
        (wide_target, wide_head), layouts, (target, head), strict=True
    ):
        what = purpose(source_dir, shape)
        (written.path / "README.md").write_text(_card(what, config, layout.source, written))
        wide_config = layout.config(config) | {
            "torch_dtype": dtype,
            "widened": {"purpose": what, "from": asdict(layout.source)},
        }
        write_json(written.path / "config.json", wide_config)  # last: nothing loads without it
    return wide_target, wide_head


def purpose(source_dir: Path, shape: LlamaShape) -> str:
    """What a wide pair is, in the words that go with every number made with it."""
    cost = "Llama-3.1-8B" if shape == LLAMA_3_1_8B else "a larger model"
    return (
        f"benchmark tool: the function of {source_dir.name} at the cost of {cost}; not a better "
        "model; every number made with it says so"
    )


def _target_config(source_dir: Path) -> dict[str, Any]:
    config = read_config(source_dir)
    if config.get("architectures") != ["LlamaForCausalLM"]:
        raise ValueError(
            f"{source_dir} holds {config.get('architectures')}: only LlamaForCausalLM can be "
            "widened; `vllm-eagle3 convert-smollm2` writes one"
        )
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(
            f"{source_dir} scales its rotary embedding ({kind!r}), which may depend on head_dim: "
            "only a Llama with a plain rotary embedding can be widened"
        )
    if not safetensors_files(source_dir):
        raise ValueError(f"{source_dir}: no weights (*.safetensors) in it")
    return config


def _head_config(head_dir: Path, source_dir: Path) -> dict[str, Any]:
    """The head's config with its captured layers named: vLLM's default depends on the depth."""
    head, target = Checkpoint.open(head_dir), TargetShape.read(source_dir)
    if head.layout != FLAT or head.files[0].suffix != ".safetensors":
        raise ValueError(
            f"{head_dir} is no flat head in safetensors: `vllm-eagle3 convert-head` makes it one"
        )
    sizes = head.config["hidden_size"], head.config["vocab_size"]
    if sizes != (target.hidden_size, target.vocab_size):
        raise ValueError(
            f"{head_dir} is for a target with (hidden size, vocabulary) {sizes}, {source_dir} has "
            f"{(target.hidden_size, target.vocab_size)}: give a head of this target"
        )
    convention = layer_convention(head, target).require(f"{head_dir}: which layers it captures")
    captured = {LAYER_IDS: list(layers_entered(head, target, convention) or ())}
    named = {CONVENTIONS_KEY: OUR_CONVENTIONS, **captured}
    return head.config | captured | {"eagle_config": head.eagle_config | named}


def _check_room(out_dir: Path, vocab_size: int, shape: LlamaShape, itemsize: int) -> None:
    layers = shape.num_layers + 2  # the head weighs less than two
    parameters = layers * shape.layer_parameters + 3 * vocab_size * shape.hidden_size
    needed, free = itemsize * parameters, shutil.disk_usage(out_dir).free
    if free < needed:
        raise ValueError(
            f"{out_dir} has {free / 1e9:.1f} GB free, and up to {needed / 1e9:.1f} GB are needed: "
            "give a folder on another disk"
        )


def _card(what: str, config: dict[str, Any], source: LlamaShape, written: "Written") -> str:
    sizes = ", ".join(f"{name} {value}" for name, value in asdict(source).items())
    return f"""# {what[0].upper()}{what[1:]}.

Made by `vllm-eagle3 bench widen`: {written.describe()}.

It computes what a model of these sizes computes: {sizes}. Kept from that model are the
vocabulary ({config["vocab_size"]} tokens) and the context length
({config["max_position_embeddings"]} tokens). All other weights are random numbers whose
contributions cancel or are multiplied by zero, so that a forward pass reads and multiplies what
the large model's would. The residual stream is zero beyond channel {source.hidden_size}.
"""
