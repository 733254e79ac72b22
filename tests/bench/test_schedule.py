from collections import Counter
from itertools import pairwise

import pytest

from vllm_eagle3.bench.questions import Question
from vllm_eagle3.bench.schedule import Prompt, make_prompts, rotation, take_round, waves

PROMPTS = [Prompt((number,), number) for number in range(7)]


class Tokenizer:
    chat_template = "a template"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return messages[-1]["content"]

    def encode(self, text, add_special_tokens):
        return [ord(letter) for letter in text]


def seeds(batches):
    return [[prompt.seed for prompt in batch] for batch in batches]


def test_the_sets_take_turns_and_long_prompts_stay_out():
    questions = [
        Question("a", 0, ("a0", "a later turn")),
        Question("a", 1, ("a1",)),
        Question("a", 2, ("a2 is long",)),
        Question("b", 0, ("b0",)),
    ]
    prompts = make_prompts(Tokenizer(), questions, longest=4, seed=5)
    texts = ["".join(map(chr, prompt.tokens)) for prompt in prompts]
    assert texts == ["a0", "b0", "a1"]
    assert prompts[1].seed == questions[3].seed(5, 0)
    with pytest.raises(ValueError, match="--max-prompt 1"):
        make_prompts(Tokenizer(), questions, longest=1, seed=5)


def test_small_batches_make_several_waves_and_large_ones_one():
    assert seeds(waves(PROMPTS, 1, 0, at_least=3)) == [[0], [1], [2]]
    assert seeds(waves(PROMPTS, 2, 0, at_least=3)) == [[0, 1], [2, 3]]
    assert seeds(waves(PROMPTS, 4, 0, at_least=3)) == [[0, 1, 2, 3]]


def test_repeats_go_on_through_the_prompts_and_start_over():
    assert seeds(waves(PROMPTS, 4, 1, at_least=1)) == [[4, 5, 6, 0]]
    # A batch may be larger than the set.
    assert seeds(waves(PROMPTS[:2], 5, 1, at_least=1)) == [[1, 0, 1, 0, 1]]


@pytest.mark.parametrize("count", [2, 3, 6])
def test_every_one_is_first_and_last_and_follows_several_others(count):
    names = [f"c{number}" for number in range(count)]
    orders = [rotation(names, repeat) for repeat in range(2 * count)]
    assert all(sorted(order) == names for order in orders)
    assert Counter(order[0] for order in orders) == dict.fromkeys(names, 2)
    assert Counter(order[-1] for order in orders) == dict.fromkeys(names, 2)
    before = {pair for order in orders for pair in pairwise(order)}
    assert all((b, a) in before for a, b in before)


def test_rounds_repeat_the_anchors():
    names = ["plain", "chain-1", "tree-8", "tree-16", "tree-32"]
    first, remaining = take_round(names, [], 3)
    assert first == names[:3]
    second, remaining = take_round(remaining, ["plain", "chain-1"], 3)
    assert second == ["plain", "chain-1", "tree-16"]
    assert remaining == ["tree-32"]
    with pytest.raises(ValueError, match="--engines-at-once 2: no room beside plain, chain-1"):
        take_round(remaining, ["plain", "chain-1"], 2)
