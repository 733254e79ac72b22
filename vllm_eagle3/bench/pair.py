"""Checks of a target and its head that need no engine: what vLLM would refuse minutes later."""

import argparse
import os
import sys
from collections.abc import Sequence

from vllm_eagle3.bench.configurations import Configuration
from vllm_eagle3.bench.target import read_config
from vllm_eagle3.heads.checkpoint import Checkpoint
from vllm_eagle3.heads.description import describe
from vllm_eagle3.heads.method import is_local
from vllm_eagle3.heads.serving import serving
from vllm_eagle3.heads.target import TargetShape

_ALLOWS_LONGER = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
_STRETCHING = ("linear", "dynamic")  # scalings of the rotary embedding that lengthen the context


def check_pair(
    args: argparse.Namespace,
    configurations: Sequence[Configuration],
    max_model_len: int | None = None,
) -> None:
    """Check that vLLM can serve ``--head`` with ``--target`` as the configurations ask.

    Models that vLLM downloads are not looked at. Warnings go to stderr.

    Args:
        max_model_len: of ``--max-model-len``, where the command has it.

    Raises:
        ValueError: there is no such folder, the head does not fit, or the context is too long.
    """
    target = TargetShape.read(args.target) if _is_local("target", args.target) else None
    if max_model_len is not None:
        check_context(args.target, max_model_len, "--max-model-len")
    drafting = [c for c in configurations if c.num_speculative_tokens is not None]
    if not drafting or not _is_local("head", args.head):
        return
    verdict = serving(describe(Checkpoint.open(args.head), target), target)
    trees = any(configuration.tree is not None for configuration in drafting)
    if not verdict.chain or (trees and not verdict.tree):
        raise ValueError(f"--head {args.head}: {'; '.join(verdict.refusals)}")
    for warning in verdict.warnings:
        print(f"vllm-eagle3: --head {args.head}: {warning}", file=sys.stderr)


def check_context(target: str, max_model_len: int, options: str) -> None:
    """Check that a local target has a context of ``max_model_len`` tokens.

    Args:
        options: what the user lowers.

    Raises:
        ValueError: the target's context is shorter.
    """
    config = read_config(target)
    text = config.get("text_config") or config
    longest = text.get("max_position_embeddings")
    if longest is None or os.environ.get(_ALLOWS_LONGER, "0") != "0":
        return
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) in _STRETCHING:
        longest = int(longest * (scaling.get("factor") or 1))
    if max_model_len > longest:
        raise ValueError(
            f"--target {target} has a context of {longest} tokens, {max_model_len} are asked for:"
            f" lower {options}"
        )


def check_prediction(args: argparse.Namespace) -> None:
    """Check that PyTorch can replay what ``--head`` drafts for ``--target``.

    Raises:
        ValueError: the target is no Llama, or the head is not here or has parts that vLLM alone
            can run.
    """
    from vllm_eagle3.bench.predictor import check

    is_here = _is_local("head", args.head)
    try:
        if not is_here:
            raise ValueError(f"--head {args.head}: no folder here")
        check(args.target, args.head)
    except ValueError as error:
        raise ValueError(
            f"nothing can be predicted: {error}; use --no-prediction for the served figures alone"
        ) from error


def _is_local(option: str, model: str) -> bool:
    try:
        found = is_local(model)
    except ValueError as error:
        raise ValueError(f"--{option} {error}") from error
    # Old models of the hub have no owner; heads have one.
    if not found and option == "head" and "/" not in model:
        raise ValueError(f"--head {model}: no such folder (to download one, give OWNER/NAME)")
    return found
