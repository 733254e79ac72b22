"""What a thread makes ahead is what would have been made in turn."""

import threading

import pytest

from vllm_eagle3.train.ahead import ahead


def test_items_come_in_order_and_an_exception_in_its_place() -> None:
    def items():
        yield from range(5)
        raise ValueError("the sixth")

    coming = ahead(items())
    assert [next(coming) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="the sixth"):
        next(coming)
    assert list(ahead(iter([]))) == []


def test_the_next_items_are_made_before_they_are_asked_for_and_not_all_of_them() -> None:
    made, third = [], threading.Event()

    def items():
        for number in range(100):
            made.append(number)
            if number == 2:
                third.set()
            yield number

    coming = ahead(items(), depth=2)
    assert next(coming) == 0
    assert third.wait(10)
    coming.close()
    assert made == [0, 1, 2]
