"""Threads that read files while the device computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue

from mlx_kimi.errors import KimiError

THREADS = 8  # an SSD serves this many at once faster than one after another
STALL = 30.0  # seconds


class ReadPool:
    """A pool whose threads never keep the program from ending, unlike ThreadPoolExecutor's.

    A read from a disk that no longer answers cannot be interrupted.
    """

    def __init__(self, threads: int = THREADS, stall: float = STALL) -> None:
        self.stall = stall
        self._work: SimpleQueue[tuple[Future[int], Callable[[], int]] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def start(self, read: Callable[[], int], begun: list[Future[int]]) -> Future[int]:
        """Let `read` run in a thread; it returns how many bytes it read.

        The future is in `begun` before the read is queued, so that a caller that is interrupted
        can still `settle` it.
        """
        future: Future[int] = Future()
        begun.append(future)
        self._work.put((future, read))
        return future

    def wait(self, reads: Sequence[Future[int]], what: str) -> int:
        """The bytes of all `reads`, once they are done.

        Raises:
            KimiError: one failed, or none has ended for `stall` seconds.
        """
        left = set(reads)
        while left:
            done, left = wait(left, self.stall, return_when="FIRST_COMPLETED")
            if not done:
                raise KimiError(f"{what}: the disk has not answered for {self.stall:.0f} s")
        return sum(read.result() for read in reads)

    def settle(self, reads: list[Future[int]]) -> None:
        """Empty `reads` once none of them can write any more, whatever became of them."""
        if wait(reads, self.stall).not_done:
            raise KimiError(f"the disk has not answered for {self.stall:.0f} s")
        reads.clear()

    def close(self) -> None:
        for _ in self._threads:
            self._work.put(None)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            future, read = item
            try:
                future.set_result(read())
            except BaseException as error:  # the waiting thread raises it
                future.set_exception(error)
            del item, future, read  # (the views in `read` hold an expert cache's memory)
