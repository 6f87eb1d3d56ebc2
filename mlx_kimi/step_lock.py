"""One step of a model at a time, whichever threads take them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import mlx.core as mx


class StepLock:
    """Threads that use one model take turns, a step each: a second one waits.

    A step writes what the model's steps share: compiled graphs and, under a memory budget, the
    slots of experts. A slot may be written once nothing submitted still reads it. MLX gives every
    thread a stream of its own, and work in one stream is in order; so a step on another stream than
    the step before first waits for that stream.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._latest: mx.Stream | None = None  # of the step before

    @contextmanager
    def step(self) -> Iterator[None]:
        """Held while a step is built and submitted."""
        with self._lock:
            stream = mx.default_stream(mx.default_device())
            if self._latest is not None and self._latest != stream:
                mx.synchronize(self._latest)
            self._latest = stream
            yield
