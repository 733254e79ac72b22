"""Ctrl-C and a scheduler's SIGTERM end a run after the step they meet, not in its middle."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def noted(active: bool = True) -> Iterator[Callable[[], bool]]:
    """While this lasts, the first SIGINT or SIGTERM is only noted; a second one is not waited for.

    Args:
        active: False leaves the signals alone. So does a thread other than the main one.

    Yields:
        whether a signal has come.
    """
    came: list[int] = []
    if not active or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    numbers = signal.SIGINT, signal.SIGTERM
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: object) -> None:
        came.append(number)
        restore()

    for number in numbers:
        signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        restore()
