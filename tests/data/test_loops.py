"""Where a text is caught in a loop."""

import random

import pytest

from vllm_eagle3.data.loops import end_of_loop


def naive(tokens: list[int]) -> int | None:
    """Look at every end, as if the tokens came one by one."""
    for end in range(1, len(tokens) + 1):
        for period in range(8, 49):
            last = tokens[max(0, end - 3 * period) : end]
            if len(last) == 3 * period and last == last[:period] * 3:
                return end
    return None


@pytest.mark.parametrize("seed", range(40))
def test_a_loop_ends_where_every_single_token_was_looked_at(seed: int) -> None:
    rng = random.Random(seed)
    loop = [rng.randrange(50) for _ in range(rng.randint(1, 60))]
    before = [rng.randrange(50) for _ in range(rng.randint(0, 100))]
    text = before + loop * rng.randint(1, 6) + [rng.randrange(50) for _ in range(20)]
    assert end_of_loop(text) == naive(text)


def test_what_is_found_and_what_is_not() -> None:
    sentence = list(range(20))
    assert end_of_loop([7] * 5 + sentence * 3) == 65
    assert end_of_loop([7] * 5 + sentence * 2 + sentence[:-1]) is None
    assert end_of_loop([1, 2] * 40) == 24
    assert end_of_loop(list(range(49)) * 4) is None
    assert end_of_loop([]) is None
