"""Options that several benchmarks share."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_eagle3.bench.configurations import PLAIN, Configuration, chain, parse_tree
from vllm_eagle3.bench.questions import DEFAULT_DATA, PACKAGED
from vllm_eagle3.options import json_object
from vllm_eagle3.paths import PUBLISHED

_DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")  # vLLM's
MEMORY_SHARE = 0.9  # of the GPU's, for all engines that live at once


def add_pair(parser: argparse.ArgumentParser) -> None:
    """Declare what is measured: a target and its head."""
    parser.add_argument(
        "--target", required=True, help="target model: a folder or a name that vLLM loads"
    )
    parser.add_argument("--head", required=True, help="its EAGLE head")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Declare which sets of questions are asked."""
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        default=DEFAULT_DATA,
        help=f"{', '.join(PACKAGED)} (80 questions each, which come with the package), JSON lines"
        ' with "turns", or folders of them (default: the three sets)',
    )


def add_configurations(
    parser: argparse.ArgumentParser,
    chains: Sequence[int],
    trees: Sequence[str],
    *,
    one_size: bool = False,
) -> None:
    """Declare which chains and trees are measured; :func:`select` makes them.

    Args:
        chains, trees: those measured unless told otherwise.
        one_size: trees have one size in every batch, not a server's smaller ones in larger ones.
    """
    add = parser.add_argument
    add(
        "--chain",
        nargs="*",
        type=int,
        default=list(chains),
        help=f"drafts of vLLM's chains (default: {' '.join(map(str, chains))})",
    )
    size = "the same in every batch" if one_size else "smaller in larger batches, as served"
    add(
        "--tree",
        nargs="*",
        default=list(trees),
        help=f"trees, {size}: N or N/DEPTH/TOP_K; static ones by name ({', '.join(PUBLISHED)})"
        f" or as a JSON file of paths (default: {' '.join(trees)})",
    )
    parser.set_defaults(one_size=one_size)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Declare the type that target and head compute in."""
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="vLLM's dtype (default: the model's; float32 without a GPU)",
    )


def add_engine_args(parser: argparse.ArgumentParser) -> None:
    """Declare what else vLLM's engines are given; ``args.engine``."""
    parser.add_argument(
        "--engine",
        "--engine-args",
        type=json_object,
        default={},
        help="further arguments of LLM, a JSON object (none)",
    )


def add_temperatures(parser: argparse.ArgumentParser) -> None:
    """Declare the temperatures at which everything is measured."""
    parser.add_argument(
        "--temperature",
        nargs="+",
        type=temperature,
        default=[0.0, 1.0],
        help="of sampling, each measured in turn; 0 is greedy (0 1)",
    )


def temperature(text: str) -> float:
    """The type of an option that is a temperature; 0 is greedy."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no temperature: give 0 (greedy) or more")
    return value


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise ``ValueError`` for the first of these options that has a value below 1.

    An option that was not given (None) passes; of several values each is checked.
    """
    for name in names:
        given = getattr(args, name)
        values = given if isinstance(given, list) else [given]
        if any(value is not None and value < 1 for value in values):
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")


def select(args: argparse.Namespace, plain: bool) -> list[Configuration]:
    """Plain decoding if wanted, ``--chain`` and ``--tree``, in this order.

    Args:
        args: of :func:`add_configurations`.

    Raises:
        ValueError: nothing or something twice, or a shape that no tree can have.
    """
    configurations = [PLAIN] if plain else []
    configurations += [chain(count) for count in args.chain]
    configurations += [parse_tree(text, args.one_size) for text in args.tree]
    _check_names(configurations)
    return configurations


def _check_names(configurations: Sequence[Configuration]) -> None:
    if not configurations:
        raise ValueError("nothing to measure: give --chain or --tree")
    if len({configuration.name for configuration in configurations}) < len(configurations):
        raise ValueError("--chain and --tree: name each one once")


def recorded(args: argparse.Namespace) -> dict[str, Any]:
    """The options that JSON can hold, for the results."""
    return {
        key: value
        for key, value in vars(args).items()
        if isinstance(value, int | float | str | list | dict) and key != "data"
    }
