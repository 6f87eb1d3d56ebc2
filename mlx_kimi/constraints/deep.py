"""llguidance reads schemas by recursion, and a stack that is too small ends the process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
STACK = 256 << 20  # bytes, of which those that are used take memory
_turn = threading.Lock()


def deeply(work: Callable[[], T]) -> T:
    """What `work` gives, in a thread of its own with a stack for 10,000 levels.

    Raises:
        ValueError: it failed, or panicked, as code in Rust does.
    """
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # a panic is no Exception
            failed.append(error)

    with _turn:
        before = threading.stack_size(STACK)
        try:
            thread = threading.Thread(target=run, name="schema")
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if failed:
        raise ValueError(str(failed[0]))
    return found[0]
