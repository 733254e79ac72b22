"""Conversations with the answers they have, as training data: no engine, no GPU.

For conversations that the target has answered already, such as a serving log. A head learns
little from answers of another model: for those there is ``vllm-eagle3 data regenerate``.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_eagle3.corpus import METADATA_FILE, Document, shard_paths, write_json, write_shard
from vllm_eagle3.data.duplicates import EvaluationSets
from vllm_eagle3.data.formats import Chat, ChatFile, read_chats
from vllm_eagle3.data.masks import ChatTemplate
from vllm_eagle3.data.target import tokenizer_for_data
from vllm_eagle3.files import make_out_folder

REPEATED = "repeated conversation"
UNANSWERED = "no answer"
_MOST_NAMES = 100  # of lines left out in the metadata; all of them are counted
_MOST_SHOWN = 5  # of unreadable ones on the screen


@dataclass(frozen=True)
class ConvertConfig:
    """How to convert.

    Attributes:
        max_turns: user turns of a conversation that are kept, at most; with 1 the chat template
            need not keep its history as it was.
        shard_documents: documents of a shard.
        exclude: JSON-lines files of prompts that must not occur, besides the bundled evaluation
            sets.
    """

    max_turns: int = 8
    shard_documents: int = 1000
    exclude: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_turns", "shard_documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-eagle3 data convert``."""
    default = ConvertConfig()
    parser.add_argument(
        "conversations", type=Path, nargs="+", metavar="FILE.jsonl",
        help="what the target has answered, in any format that data regenerate reads",
    )  # fmt: skip
    parser.add_argument("--target", required=True, help="whose chat template makes the loss mask")
    parser.add_argument("--out", required=True, type=Path, help="folder for the shards")
    parser.add_argument(
        "--max-turns", type=int, default=default.max_turns,
        help=f"user turns that are kept, at most ({default.max_turns})",
    )  # fmt: skip
    parser.add_argument(
        "--shard-documents", type=int, default=default.shard_documents,
        help=f"documents of a shard ({default.shard_documents})",
    )  # fmt: skip
    parser.add_argument(
        "--exclude", type=Path, nargs="*", default=(), metavar="FILE.jsonl",
        help="prompts that must not occur, besides the bundled evaluation sets",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """The command ``vllm-eagle3 data convert``."""
    config = ConvertConfig(args.max_turns, args.shard_documents, tuple(args.exclude))
    tokenizer = tokenizer_for_data(args.target)
    metadata = convert(
        args.conversations, tokenizer, args.out, config, target=Path(args.target).name
    )
    print(
        "".join(f"left out: {line}\n" for line in metadata["unreadable_lines"][:_MOST_SHOWN])
        + f"{metadata['documents']:,} conversations, {metadata['tokens']:,} tokens;"
        f" {sum(metadata['dropped'].values()):,} left out,"
        f" {metadata['unreadable']:,} unreadable lines",
        file=sys.stderr,
    )


def convert(
    paths: Sequence[Path],
    tokenizer: Any,
    out_dir: Path,
    config: ConvertConfig | None = None,
    *,
    target: str = "",
) -> dict[str, Any]:
    """Write the conversations of ``paths`` into shards of ``out_dir``.

    Returns:
        The content of ``metadata.json``: documents, tokens, what was left out and why.

    Raises:
        FileNotFoundError: no such file of conversations.
        ValueError: no conversation can be used, an unsuitable chat template, a folder that holds
            training data, or a full disk; the shards of this call are then deleted.
    """
    config, out_dir = config or ConvertConfig(), Path(out_dir)
    if any(shard_paths(out_dir)):
        raise ValueError(f"{out_dir} holds training data: choose another folder for --out")
    given = read_chats(paths)
    chats = [_first_turns(chat, config.max_turns) for chat in given.chats]
    template = ChatTemplate(tokenizer, turns=max(len(chat.answers) for chat in chats) or 1)
    make_out_folder(out_dir)
    kept, left_out = Counter(), {}
    documents = _documents(chats, template, EvaluationSets.from_files(config.exclude), left_out)
    written: list[Path] = []
    try:
        for shard in _in_parts(documents, config.shard_documents):
            written.append(out_dir / f"shard-00-{len(written):05d}.safetensors")
            write_shard(written[-1], shard)
            kept["documents"] += len(shard)
            kept["tokens"] += sum(len(d.tokens) for d in shard)
            kept["assistant_tokens"] += int(sum(d.assistant.sum() for d in shard))
        if not written:
            number, why = next(iter(left_out.items()))
            raise ValueError(f"no conversation can be used ({given.names[number]}: {why})")
        metadata = _metadata(target, given, kept, left_out, config)
        write_json(out_dir / METADATA_FILE, metadata)
    except BaseException:
        # Half of the conversations would pass for all of them.
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return metadata


def _metadata(
    target: str, given: ChatFile, kept: Counter, left_out: dict[int, str], config: ConvertConfig
) -> dict[str, Any]:
    names = [f"{given.names[number]}: {why}" for number, why in left_out.items()]
    return {
        "description": "given conversations with the answers they had.",
        "target": target,
        **kept,
        "dropped": dict(Counter(left_out.values())),
        "dropped_lines": names[:_MOST_NAMES],
        "unreadable": len(given.unreadable),
        "unreadable_lines": given.unreadable[:_MOST_NAMES],
        "config": asdict(config) | {"exclude": [Path(path).name for path in config.exclude]},
    }


def _first_turns(chat: Chat, turns: int) -> Chat:
    return Chat(chat.system, chat.users[:turns], chat.answers[:turns])


def _documents(
    chats: Sequence[Chat],
    template: ChatTemplate,
    evaluation_sets: EvaluationSets,
    left_out: dict[int, str],
) -> Iterator[Document]:
    """Those that can be used; the numbers of the others go to ``left_out``, with the reason."""
    from tqdm import tqdm

    seen: set[Chat] = set()
    for number, chat in enumerate(tqdm(chats, "converting", disable=not sys.stderr.isatty())):
        finding = UNANSWERED if not chat.answers else REPEATED if chat in seen else None
        finding = finding or evaluation_sets.any_repeated_by(chat.users)
        seen.add(chat)
        if finding is None:
            try:
                yield template.document(chat)
                continue
            except ValueError as error:
                finding = str(error)
        left_out[number] = finding


def _in_parts(documents: Iterator[Document], size: int) -> Iterator[list[Document]]:
    part: list[Document] = []
    for document in documents:
        part.append(document)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
