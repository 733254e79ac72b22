"""Questions of the evaluation sets, and the prompts made of them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

PACKAGED = {
    name: Path(__file__).parent / "data" / f"{name}.jsonl"
    for name in ("mt_bench", "humaneval", "gsm8k")
}
DEFAULT_DATA = list(PACKAGED.values())


@dataclass(frozen=True)
class Question:
    """One conversation of which the user's side is given.

    Attributes:
        dataset: name of the set, the stem of its file.
        number: position in the file, from 0.
        turns: the user's messages, in order.
        category: the kind of question, where the file names one.
    """

    dataset: str
    number: int
    turns: tuple[str, ...]
    category: str | None = None

    def seed(self, base: int, turn: int) -> int:
        """A seed of its own for each turn, the same in every configuration.

        It does not depend on which other sets are benchmarked, so a subset repeats.
        """
        return crc32(f"{base}/{self.dataset}/{self.number}/{turn}".encode()) >> 1


def load_questions(paths: Iterable[str | Path], limit: int | None = None) -> list[Question]:
    """Read JSON lines with a ``turns`` list, each file (or ``*.jsonl`` of a folder) a set.

    Args:
        paths: files, folders and names of ``PACKAGED`` sets.
        limit: keep the first so many questions of each set.

    Raises:
        ValueError: nothing to read, a line without ``turns``, or two sets of one name.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files.extend(sorted(path.glob("*.jsonl")))
        elif path.is_file():
            files.append(path)
        elif str(path) in PACKAGED:
            files.append(PACKAGED[str(path)])
        else:
            raise ValueError(
                f"--data {path}: no such file or folder, and none of {', '.join(PACKAGED)}"
            )
    if not files:
        raise ValueError("--data: no *.jsonl file to read questions from")
    stems = [file.stem for file in files]
    if len(set(stems)) < len(stems):
        raise ValueError(f"--data: two files of the same name among {', '.join(stems)}")
    return [question for file in files for question in _read(file, limit)]


def _read(file: Path, limit: int | None) -> list[Question]:
    questions: list[Question] = []
    with file.open(encoding="utf-8") as lines:
        for line_number, line in enumerate(lines, 1):
            if len(questions) == limit:
                break
            if not line.strip():
                continue
            try:
                question = json.loads(line)
                turns = question["turns"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{file}, line {line_number}: expected a JSON object with "turns"'
                ) from error
            if not (isinstance(turns, list) and turns and all(isinstance(t, str) for t in turns)):
                raise ValueError(f'{file}, line {line_number}: "turns" must be a list of strings')
            category = question.get("category")
            if not isinstance(category, str | None):
                raise ValueError(f'{file}, line {line_number}: "category" must be a string')
            questions.append(Question(file.stem, len(questions), tuple(turns), category))
    return questions


def chat_messages(turns: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    """The conversation up to the first turn that has no answer yet."""
    messages: list[dict[str, str]] = []
    for turn, answer in zip(turns, answers, strict=False):
        messages.append({"role": "user", "content": turn})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": turns[len(answers)]})
    return messages


def chat_prompt(tokenizer: Any, turns: Sequence[str], answers: Sequence[str]) -> list[int]:
    """Token ids of the conversation in the target's own chat template.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the target's tokenizer has no chat template: benchmark a chat model, or add a"
            " chat_template to its tokenizer_config.json"
        )
    text = tokenizer.apply_chat_template(
        chat_messages(turns, answers), tokenize=False, add_generation_prompt=True
    )
    # The template writes the special tokens itself.
    return tokenizer.encode(text, add_special_tokens=False)
