"""A `map` that runs in a thread of its own, a bounded number of items ahead of its caller."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], count: int
) -> Iterator[Iterator[Result]]:
    """`map(function, items)`, computed in one thread while the caller works on what it has.

    The caller's thread draws the items. What `function` raises is raised to the caller in place of
    that result. On leaving the block, the item being worked on is finished and no other begun.

    Args:
        function: called for one item after another.
        items: drawn as they are needed.
        count: items that are in work or done, beside the one whose result is taken.
    """
    pool = ThreadPoolExecutor(1)
    try:
        yield _results(pool, function, items, count)
    finally:
        pool.shutdown(cancel_futures=True)


def _results(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    count: int,
) -> Iterator[Result]:
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        del item  # else it would be kept until the next one is there
        if len(pending) > count:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
