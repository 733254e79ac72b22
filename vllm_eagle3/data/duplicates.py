"""Prompts that repeat an evaluation set, exactly or nearly.

A head that has seen the questions of its own evaluation looks better than it is. As is usual
(GPT-3, arXiv 2005.14165, appendix C), a text is a near duplicate of a question when the two
share 13 successive words; here a question of 6 to 12 words must occur whole. Shorter ones
("Tell me a joke.") are everybody's, and only an equal prompt counts. Case, punctuation and
white space never matter.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import vllm_eagle3
from vllm_eagle3.data.formats import read_chats

NGRAM_WORDS = 13
SHORTEST_WORDS = 6
EXACT = "equal to an evaluation prompt"
NEAR = "nearly an evaluation prompt"


@cache
def bundled_sets() -> tuple[Path, ...]:
    """The evaluation sets that this package measures heads with."""
    folder = Path(vllm_eagle3.__file__).parent / "bench" / "data"
    return tuple(sorted(folder.glob("*.jsonl")))


class EvaluationSets:
    """The questions that training data must not repeat."""

    def __init__(self, questions: Iterable[str]) -> None:
        self._whole: set[tuple[str, ...]] = set()
        self._ngrams: dict[int, set[tuple[str, ...]]] = {}
        for question in questions:
            words = _words(question)
            self._whole.add(words)
            length = min(len(words), NGRAM_WORDS)
            if length >= SHORTEST_WORDS:
                self._ngrams.setdefault(length, set()).update(_ngrams(words, length))

    @classmethod
    def from_files(cls, paths: Iterable[Path] = ()) -> "EvaluationSets":
        """All user turns of the bundled sets and of ``paths``, JSON lines of any format.

        Raises:
            ValueError: a line cannot be read; left out, its question would go unnoticed.
        """
        chats, unreadable, _ = read_chats([*bundled_sets(), *paths])
        if unreadable:
            raise ValueError(f"an evaluation set is damaged: {unreadable[0]}")
        return cls(question for chat in chats for question in chat.users)

    def repeated_by(self, text: str) -> str | None:
        """:data:`EXACT` or :data:`NEAR` if ``text`` repeats a question, None if not."""
        words = _words(text)
        if words in self._whole:
            return EXACT
        for length, ngrams in self._ngrams.items():
            if any(ngram in ngrams for ngram in _ngrams(words, length)):
                return NEAR
        return None

    def any_repeated_by(self, texts: Sequence[str]) -> str | None:
        """The first finding among ``texts``."""
        return next(filter(None, map(self.repeated_by, texts)), None)


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def _ngrams(words: tuple[str, ...], length: int) -> Iterable[tuple[str, ...]]:
    return (words[start : start + length] for start in range(len(words) - length + 1))
