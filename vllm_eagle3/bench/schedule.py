"""Who is measured when: rounds of engines, cells, repeats, and the order within each."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from vllm_eagle3.bench.questions import Question, chat_prompt


@dataclass(frozen=True, order=True)
class Cell:
    """One setting in which all configurations are compared."""

    batch_size: int
    temperature: float


@dataclass(frozen=True)
class Prompt:
    """A question's first turn, as token ids, with its sampling seed."""

    tokens: tuple[int, ...]
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """As :mod:`vllm_eagle3.bench.timing` reads it."""
        return {"prompt": list(self.tokens), "seed": self.seed}


def take_turns(
    questions: Sequence[Question], group: Callable[[Question], Hashable]
) -> list[Question]:
    """One question of each group, then the next of each, until all are taken."""
    groups: dict[Hashable, list[Question]] = {}
    for question in questions:
        groups.setdefault(group(question), []).append(question)
    rows = zip_longest(*groups.values())
    return [question for row in rows for question in row if question is not None]


def make_prompts(
    tokenizer: Any, questions: Sequence[Question], longest: int, seed: int
) -> list[Prompt]:
    """The first turns of the questions, the data sets taking turns.

    Args:
        longest: prompts of more tokens are left out.

    Raises:
        ValueError: none is left, or the tokenizer has no chat template.
    """
    mixed = take_turns(questions, lambda question: question.dataset)
    prompts = [
        Prompt(tuple(chat_prompt(tokenizer, question.turns[:1], [])), question.seed(seed, 0))
        for question in mixed
    ]
    kept = [prompt for prompt in prompts if len(prompt.tokens) <= longest]
    if not kept:
        raise ValueError(f"--max-prompt {longest}: no question is that short")
    return kept


def waves(
    prompts: Sequence[Prompt], batch_size: int, repeat: int, at_least: int
) -> list[list[Prompt]]:
    """The batches of one repeat: as many as ``at_least`` prompts need, each of full size.

    Successive repeats go on through the prompts and start over at their end.
    """
    count = -(-max(batch_size, at_least) // batch_size)
    first = repeat * count * batch_size
    return [
        [prompts[(first + number * batch_size + row) % len(prompts)] for row in range(batch_size)]
        for number in range(count)
    ]


def rotation(names: Sequence[str], repeat: int) -> list[str]:
    """The order of a repeat: each starts with another one, and every second runs backwards.

    So none is always first, and none always follows the same one.
    """
    start = (repeat // 2) % len(names) if names else 0
    order = [*names[start:], *names[:start]]
    return order[::-1] if repeat % 2 else order


def take_round(
    remaining: Sequence[str], anchors: Sequence[str], num_engines: int
) -> tuple[list[str], list[str]]:
    """The next engines that live side by side, and those that remain for later rounds.

    Args:
        remaining: configurations not measured yet.
        anchors: measured again in every later round, because only figures of one round
            compare.

    Raises:
        ValueError: no room for anything beside the anchors.
    """
    room = num_engines - len(anchors)
    if room < 1:
        raise ValueError(
            f"--engines-at-once {num_engines}: no room beside {', '.join(anchors)}, which every"
            " round repeats"
        )
    return [*anchors, *remaining[:room]], list(remaining[room:])
