"""What long work is at: a line that is drawn again, on stderr where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column
from rich.text import Text

from mlx_kimi.units import human_size

BAR = 16  # columns of a screen that may have 40
BYTES = "bytes"


class Work:
    """Long work. Nothing is drawn before it says what it is at, or that a part is done."""

    def __init__(self, bar: Progress, what: str, is_shown: bool) -> None:
        self._bar, self._task, self._is_shown = bar, bar.add_task(what, total=None), is_shown

    def at(self, what: str) -> None:
        """Say what is done now; how much of it is not known yet."""
        self._bar.update(self._task, description=what, completed=0, total=None)
        self._draw()

    def __call__(self, done: int, total: int) -> None:
        """Say how much is done."""
        self._bar.update(self._task, completed=done, total=total)
        if done:  # what takes one step needs no bar
            self._draw()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Leave the screen to something else for a while."""
        if not self._bar.live.is_started:
            yield
            return
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()

    def _draw(self) -> None:
        if not self._is_shown:
            return
        if not self._bar.live.is_started:
            self._bar.start()
        if not self._bar.live.auto_refresh:
            self._bar.refresh()


@contextmanager
def work(what: str = "", unit: str = "", *, by_itself: bool = True) -> Iterator[Work]:
    """Show what is at work within, on a terminal.

    Args:
        unit: of what is counted; BYTES are shown with their speed.
        by_itself: a thread draws. Without, it is drawn where it is told, as what is measured wants.
    """
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        _Known(BarColumn(BAR, style="bright_black", complete_style="green")),
        _Known(_Amount(unit)),
        *([_Known(TransferSpeedColumn())] if unit == BYTES else []),
        _Known(TimeRemainingColumn(), otherwise=TimeElapsedColumn()),
    ]
    if by_itself:
        columns.insert(0, SpinnerColumn())
    # What is printed within stays where it goes: stdout may be a file.
    bar = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        auto_refresh=by_itself,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    try:
        yield Work(bar, what, sys.stderr.isatty())
    finally:
        if bar.live.is_started:
            bar.stop()


@contextmanager
def loading() -> Iterator[None]:
    """While a model is loaded."""
    with work() as doing:
        doing.at("loading the model")
        yield


class _Known(ProgressColumn):
    """A column for work of which it is known how much there is; another, or nothing, before."""

    def __init__(self, column: ProgressColumn, otherwise: ProgressColumn | None = None) -> None:
        super().__init__()
        self._column, self._otherwise = column, otherwise
        self.max_refresh = None

    def render(self, task: Task) -> Text:
        column = self._otherwise if task.total is None else self._column
        return column(task) if column else Text("")  # type: ignore[return-value]


class _Amount(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._shown: Callable[[float], str] = human_size if unit == BYTES else "{:,.0f}".format
        self._unit = "" if unit == BYTES else f" {unit}"

    def render(self, task: Task) -> Text:
        assert task.total is not None
        return Text(f"{self._shown(task.completed)} of {self._shown(task.total)}{self._unit}")
