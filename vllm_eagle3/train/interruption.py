"""Ctrl-C and a scheduler's SIGTERM end a run after the step they meet, not in its middle."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def noted(patient: bool = False) -> Iterator[Callable[[], bool]]:
    """While this lasts, the first SIGINT or SIGTERM is only noted; a second one is not waited for.

    A thread other than the main one leaves the signals alone.

    Args:
        patient: further ones are noted as well. ``torchrun`` passes on a Ctrl-C that the
            terminal has sent already, and has a time limit of its own.

    Yields:
        whether a signal has come.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    numbers = signal.SIGINT, signal.SIGTERM
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: object) -> None:
        came.append(number)
        if not patient:
            restore()

    for number in numbers:
        signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        restore()
