"""What training data is like, and whether it resembles the traffic it is made for."""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_eagle3.corpus import Document, read_corpus, write_json
from vllm_eagle3.data.analysis_report import report
from vllm_eagle3.data.clusters import Clusters, typical_tokens
from vllm_eagle3.data.formats import read_chats
from vllm_eagle3.data.statistics import (
    VOCABULARY_SIZES,
    NgramIndex,
    coverage,
    quantiles,
    scripts,
    turns_of,
)
from vllm_eagle3.data.target import load_tokenizer

ANALYSIS_FILE = "analysis.json"
_HELD_OUT = 10  # every tenth document is measured with what the others hold
_SCRIPT_DOCUMENTS = 1000
_TERMS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-eagle3 data analyse``."""
    parser.add_argument(
        "data", type=Path, nargs="+", metavar="DIR",
        help="folders of `data synth`, `data regenerate` or `data convert`",
    )  # fmt: skip
    parser.add_argument(
        "--log", type=Path, nargs="+", default=(), metavar="SERVING.jsonl",
        help="conversations that you serve, in any format that data regenerate reads",
    )  # fmt: skip
    parser.add_argument(
        "--target", help="whose tokenizer the data has; needed for --log, and shows words"
    )
    parser.add_argument("--clusters", type=int, default=8, help="clusters of documents (8)")
    parser.add_argument("--seed", type=int, default=0, help="of the clusters (0)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help=f"where to write (DIR/{ANALYSIS_FILE}); needed for several folders",
    )


def run(args: argparse.Namespace) -> None:
    """The command ``vllm-eagle3 data analyse``."""
    if args.log and not args.target:
        raise ValueError("--log needs --target: its tokenizer makes the log comparable")
    if args.out is None and len(args.data) > 1:
        raise ValueError("give --out: several folders have no place of their own for the analysis")
    out = args.out or args.data[0] / ANALYSIS_FILE
    if args.out and not out.parent.is_dir():
        raise ValueError(f"--out {out}: no such folder as {out.parent}")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: give a file in it")
    tokenizer = load_tokenizer(args.target) if args.target else None
    result = analyse(
        *args.data, tokenizer=tokenizer, log=args.log, clusters=args.clusters, seed=args.seed
    )
    print(report(result))
    write_json(out, result)


def analyse(
    *data_dirs: Path,
    tokenizer: Any = None,
    log: Sequence[Path] = (),
    clusters: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of the shards in ``data_dirs``, beside those of a serving ``log``.

    Shares are between 0 and 1. What a tenth of the data shares with the rest is the yardstick
    for what the log shares with it; there is none of fewer than ten documents.

    Args:
        tokenizer: the target's; without it clusters show token ids, and there is no log.

    Raises:
        ValueError: no data, a damaged shard, no readable line in the log, or a bad setting.
    """
    if clusters < 1:
        raise ValueError(f"clusters={clusters} must be at least 1")
    if log and tokenizer is None:
        raise ValueError("a log needs the target's tokenizer")
    documents = read_corpus(*data_dirs)
    traffic = _read_log(log, tokenizer) if log else None
    answers = [[len(turn) for turn in turns_of(d, assistant=True)] for d in documents]
    result: dict[str, Any] = {
        "documents": len(documents),
        "tokens": int(sum(len(d.tokens) for d in documents)),
        "assistant_tokens": sum(map(sum, answers)),
        "document_tokens": quantiles([len(d.tokens) for d in documents]),
        "answer_tokens": quantiles([length for lengths in answers for length in lengths]),
        "turns": dict(sorted(Counter(len(lengths) for lengths in answers).items())),
        "clusters": _clusters(documents, traffic, tokenizer, clusters, seed),
        "vocabulary": _vocabulary(documents, traffic, _vocabulary_sizes(documents, tokenizer)),
    }
    if tokenizer is not None:
        chosen = documents[:: -(-len(documents) // _SCRIPT_DOCUMENTS)]
        result["scripts"] = scripts(tokenizer.decode(d.tokens) for d in chosen)
    if traffic is not None:
        result["log"] = _overlap(documents, traffic)
    return result


@dataclass(frozen=True)
class _Traffic:
    """Token ids of a log's conversations: all messages of each, and the answers alone."""

    messages: list[list[np.ndarray]]
    answers: list[np.ndarray]
    unreadable: list[str]


def _read_log(paths: Sequence[Path], tokenizer: Any) -> _Traffic:
    def encode(text: str) -> np.ndarray:
        return np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int64)

    chats, unreadable, _ = read_chats(paths)
    messages, answers = [], []
    for chat in chats:
        written = [encode(answer) for answer in chat.answers]
        messages.append([*map(encode, chat.users), *written])
        answers += written
    return _Traffic(messages, answers, unreadable)


def _clusters(
    documents: Sequence[Document],
    traffic: _Traffic | None,
    tokenizer: Any,
    count: int,
    seed: int,
) -> list[dict[str, Any]]:
    tokens = [document.tokens for document in documents]
    found = Clusters.fit(tokens, count, seed)
    nearest_D = found.assign(tokens)
    clusters = len(found.centres_KF)
    sizes = np.bincount(nearest_D, minlength=clusters)
    typical = typical_tokens(tokens, nearest_D, clusters)
    in_log = None
    if traffic is not None:
        served = found.assign([np.concatenate(messages) for messages in traffic.messages])
        in_log = np.bincount(served, minlength=clusters) / len(served)
    return [
        {
            "documents": int(sizes[k]),
            "share": float(sizes[k] / len(documents)),
            "log_share": None if in_log is None else float(in_log[k]),
            "typical": _terms(typical[k], tokenizer),
        }
        for k in np.argsort(-sizes, kind="stable")
        if sizes[k]
    ]


def _terms(tokens: np.ndarray, tokenizer: Any) -> list[str]:
    """The first tokens that are words; any tokens, as ids, without a tokenizer."""
    if tokenizer is None:
        return [str(token) for token in tokens[:_TERMS]]
    words: dict[str, None] = {}
    for token in tokens[: 20 * _TERMS]:
        word = tokenizer.decode([int(token)]).strip()
        if word.isalpha() and (len(word) > 2 or not word.isascii()):
            words.setdefault(word.lower())
    return list(words)[:_TERMS]


def _vocabulary_sizes(documents: Sequence[Document], tokenizer: Any) -> list[int]:
    """Sizes of draft vocabularies that the target's can hold: as far as known, its own size."""
    if tokenizer is not None:
        largest = len(tokenizer)
    else:
        largest = 1 + max(int(document.tokens.max()) for document in documents)
    return [size for size in VOCABULARY_SIZES if size <= largest] or [largest]


def _vocabulary(
    documents: Sequence[Document], traffic: _Traffic | None, sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """What the most frequent tokens of the answers cover, by the size of a draft vocabulary."""
    written = [document.tokens[document.assistant] for document in documents]
    rest, held_out = _split(written)
    log = [None] * len(sizes)
    if traffic is not None and traffic.answers:
        log = coverage(written, traffic.answers, sizes)
    held_out_shares = coverage(rest, held_out, sizes) if held_out else [None] * len(log)
    columns = (coverage(written, written, sizes), held_out_shares, log)
    return [
        {"size": size, "data": data, "held_out": held, "log": served}
        for size, data, held, served in zip(sizes, *columns, strict=True)
    ]


def _overlap(documents: Sequence[Document], traffic: _Traffic) -> dict[str, Any]:
    """What the data holds of the log's tokens and n-grams, and of a tenth of itself."""
    rest, held_out = _split(documents)
    # Like with like: a log of prompts alone is measured with the data's prompts alone.
    sides = (True, False) if traffic.answers else (False,)
    turns = [turn for d in held_out for side in sides for turn in turns_of(d, assistant=side)]
    messages = [message for conversation in traffic.messages for message in conversation]
    learnt = [document.tokens for document in rest]
    tokens, ngrams = NgramIndex(learnt, 1), NgramIndex(learnt)
    return {
        "conversations": len(traffic.messages),
        "tokens": int(sum(map(len, messages))),
        "unreadable": len(traffic.unreadable),
        "unreadable_lines": traffic.unreadable[:100],
        "tokens_in_data": tokens.share_of(messages),
        "4grams_in_data": ngrams.share_of(messages),
        "held_out_tokens_in_data": tokens.share_of(turns) if held_out else None,
        "held_out_4grams_in_data": ngrams.share_of(turns) if held_out else None,
        "answer_tokens": quantiles([len(a) for a in traffic.answers]) if traffic.answers else None,
    }


def _split(items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    rest = [item for number, item in enumerate(items) if number % _HELD_OUT != _HELD_OUT - 1]
    return rest, list(items[_HELD_OUT - 1 :: _HELD_OUT])
