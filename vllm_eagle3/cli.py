"""The command ``vllm-eagle3``: each subcommand is a module, imported when it is called.

Such a module has ``add_arguments(parser)`` and ``run(args)``, which returns the exit code or
``None`` for 0.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from vllm_eagle3 import __version__


class Command(NamedTuple):
    """One subcommand; its module stays unimported until it is called."""

    words: tuple[str, ...]
    module: str
    help: str
    extra: str = ""  # of pyproject.toml, with what the module needs


COMMANDS = (
    Command(("doctor",), "vllm_eagle3.engine.doctor", "can this machine serve draft trees?"),
    Command(
        ("demo",),
        "vllm_eagle3.demo.run",
        "plain decoding, a chain and a tree, side by side",
        "demo",
    ),
    Command(
        ("convert-smollm2",),
        "vllm_eagle3.demo.smollm2",
        "write the demo's target model",
        "demo",
    ),
    Command(
        ("data", "synth"),
        "vllm_eagle3.engine.synthesize",
        "let a target write training data",
        "train",
    ),
    Command(
        ("data", "regenerate"),
        "vllm_eagle3.engine.regenerate",
        "let a target answer the prompts of conversations anew",
        "train",
    ),
    Command(
        ("data", "convert"),
        "vllm_eagle3.data.convert",
        "conversations that the target has answered already, as training data",
        "train",
    ),
    Command(
        ("data", "analyse"),
        "vllm_eagle3.data.analyse",
        "what is in training data, and does it resemble your traffic?",
        "train",
    ),
    Command(("train",), "vllm_eagle3.train.trainer", "train a draft head", "train"),
    Command(
        ("eval",),
        "vllm_eagle3.bench.evaluate",
        "what a head gains when served, beside what training predicts of it",
    ),
    Command(("inspect",), "vllm_eagle3.heads.inspect", "what is a head, and how is it served?"),
    Command(
        ("convert-head",),
        "vllm_eagle3.heads.convert",
        "write a head in vLLM's or in the speculators format",
    ),
    Command(
        ("bench", "heads"),
        "vllm_eagle3.bench.heads",
        "heads of one target in one table, and tau over training tokens",
    ),
    Command(
        ("bench", "acceptance"),
        "vllm_eagle3.bench.acceptance",
        "mean acceptance length of chains and trees",
    ),
    Command(
        ("bench", "speed"),
        "vllm_eagle3.bench.speed",
        "tokens per second of plain decoding, chains and trees, side by side",
        "bench",
    ),
    Command(("bench", "plot"), "vllm_eagle3.bench.plot", "plots of such a measurement", "bench"),
    Command(
        ("bench", "serving"),
        "vllm_eagle3.bench.serving",
        "latency of streams, as vLLM's own client reports it",
    ),
    Command(
        ("bench", "memory"),
        "vllm_eagle3.bench.memory",
        "KV blocks of chains and trees in the same GPU memory",
    ),
    Command(
        ("bench", "attention"),
        "vllm_eagle3.bench.attention",
        "attention to trees beside FlashAttention 3 on chains",
    ),
    Command(
        ("bench", "train"),
        "vllm_eagle3.bench.train",
        "tokens per second and peak memory of training, beside a naive loop",
        "train",
    ),
    Command(
        ("bench", "widen"),
        "vllm_eagle3.bench.widen",
        "write a pair of a small model's function and a large one's cost",
    ),
)
_GROUPS = {("data",): "make and analyse training data", ("bench",): "measure"}


class _CommandParser(argparse.ArgumentParser):
    """A parser that asks its module for the options only when its command is called."""

    command: Command | None = None

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        if self.command is not None:
            with _naming_extra(self.command.extra):
                module = import_module(self.command.module)
                module.add_arguments(self)
            self.set_defaults(run=module.run)
        return super().parse_known_args(*args, **kwargs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; what the user can mend ends in one line.

    Returns:
        The command's exit code; 2 for a wrong setting or a file that is missing, 1 for a path
        that the file system refuses.
    """
    try:
        args = _parser().parse_args(argv)
        with _naming_extra(args.extra):
            return args.run(args) or 0
    except ValueError as error:
        return _fail(str(error))
    except FileNotFoundError as error:
        return _fail(_of_path(error))
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        if error.filename is None:  # not of a path, such as one that a user has given
            raise
        return _fail(_of_path(error), 1)
    except KeyboardInterrupt:
        return 130


@contextmanager
def _naming_extra(extra: str) -> Iterator[None]:
    """Turn a missing package into a ValueError that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if not extra or (error.name or "").startswith("vllm_eagle3"):
            raise
        remedy = f"run pip install '.[{extra}]' in a checkout of the repository"
        raise ValueError(f"{error}: {remedy}") from error


def _of_path(error: OSError) -> str:
    return str(error) if error.filename is None else f"{error.strerror}: {error.filename}"


def _fail(message: str, code: int = 2) -> int:
    print(f"vllm-eagle3: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-eagle3", description="EAGLE draft trees for vLLM, dynamic or static."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = _subcommands(parser)
    groups: dict[tuple[str, ...], Any] = {(): commands}
    for command in COMMANDS:
        group, word = command.words[:-1], command.words[-1]
        if group not in groups:
            groups[group] = _subcommands(commands.add_parser(*group, help=_GROUPS[group]))
        subparser = groups[group].add_parser(word, help=command.help, description=command.help)
        subparser.command = command
        subparser.set_defaults(extra=command.extra)
    return parser


def _subcommands(parser: argparse.ArgumentParser) -> Any:
    return parser.add_subparsers(
        metavar="COMMAND", required=True, parser_class=_CommandParser, title="commands"
    )


if __name__ == "__main__":
    sys.exit(main())
