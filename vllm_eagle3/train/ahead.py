"""Items made by a thread while those before them are worked on."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Iterator[Item], depth: int = 2) -> Iterator[Item]:
    """The same items in the same order; what making one raises is raised in its place.

    Args:
        depth: items that may be made before they are asked for.
    """
    end = object()
    with ThreadPoolExecutor(1, "ahead") as thread:
        made = deque(thread.submit(next, items, end) for _ in range(depth))
        while (item := made.popleft().result()) is not end:
            made.append(thread.submit(next, items, end))
            yield item
