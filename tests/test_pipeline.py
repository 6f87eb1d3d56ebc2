"""Work ahead in a thread: in order, beside the caller's, bounded, stopped on leaving."""

import threading
import time
from collections.abc import Iterator

import pytest

from mlx_kimi.convert.pipeline import ahead


def test_results_come_in_order() -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0)
        return item * item

    with ahead(slow_first, range(50), 3) as results:
        assert list(results) == [item * item for item in range(50)]


def test_it_works_while_the_caller_does() -> None:
    began = threading.Event()

    def second_begins(item: int) -> int:
        if item == 1:
            began.set()
        return item

    with ahead(second_begins, range(2), 1) as results:
        assert next(results) == 0
        assert began.wait(5)  # seconds; without a thread it never begins


@pytest.mark.parametrize("count", [1, 2, 5])
def test_no_more_items_are_drawn_than_asked_for(count: int) -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            drawn.append(item)
            yield item

    with ahead(lambda item: item, items(), count) as results:
        for item in results:
            assert len(drawn) <= item + 1 + count


def test_an_error_takes_the_place_of_its_result() -> None:
    def third_fails(item: int) -> int:
        if item == 2:
            raise OSError("no more")
        return item

    seen = []
    with pytest.raises(OSError, match="no more"), ahead(third_fails, range(9), 2) as results:
        for item in results:
            seen.append(item)
    assert seen == [0, 1]


def test_leaving_finishes_what_is_in_work_and_begins_nothing() -> None:
    entered, go_on = threading.Event(), threading.Event()
    done: list[int] = []

    def waits(item: int) -> int:
        if item == 1:
            entered.set()
            go_on.wait(5)
        done.append(item)
        return item

    with pytest.raises(KeyboardInterrupt), ahead(waits, range(9), 3) as results:
        next(results)
        assert entered.wait(5)
        threading.Timer(0.05, go_on.set).start()
        raise KeyboardInterrupt
    assert done == [0, 1]
