"""Ctrl-C where nothing is to be kept: while Python imports, and when a command is over."""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 130  # 128 + SIGINT, as shells report a program that it ended


def end_quietly() -> None:
    """From now on Ctrl-C ends the program at once, without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # (else it is ignored)
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """From now on Ctrl-C is a KeyboardInterrupt, if `end_quietly` had changed that."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\n")
    os._exit(INTERRUPTED)
