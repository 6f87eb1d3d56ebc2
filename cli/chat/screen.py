"""What a chat shows: on a terminal, streamed markdown above a status line; in a pipe, the text."""

from __future__ import annotations

import signal
import sys
import termios
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mlx_kimi.cli import show
from mlx_kimi.cli.chat.markdown import QUIET, MarkdownBlock, MarkdownBlocks
from mlx_kimi.cli.progress import work
from mlx_kimi.generation.answer import Chunk, Stats

REDRAW_SECONDS = 0.05  # at least, between two drawings of the block that grows
REDRAW_SHARE = 5  # times what a drawing takes passes before the next: long blocks take longer
ROWS_LEFT = 5  # of the screen, beside the block that grows


Progress = Callable[[int, int], None]


class Screen(Protocol):
    """Where answers and everything else go."""

    def answer(self, stream: Callable[[Progress], Iterable[Chunk]]) -> Stats | None:
        """Show an answer as it comes; its counts, or None where there is no token.

        Raises:
            KeyboardInterrupt: Ctrl-C, once what was said is shown whole.
        """

    def said(self, text: str) -> None:
        """Show an answer of an earlier time."""

    def note(self, text: str) -> None:
        """Say something that is no answer."""

    def pairs(self, rows: Mapping[str, str]) -> None:
        """Say what each of the words on the left means."""

    def error(self, text: str) -> None:
        """Say what is wrong."""


class PlainScreen:
    """stdout is the answers, one after another; stderr is everything else."""

    def answer(self, stream: Callable[[Progress], Iterable[Chunk]]) -> Stats | None:
        stats, answer = None, show.AnswerWriter()
        try:
            for chunk in stream(lambda done, total: None):
                answer.write(chunk.text)
                stats = chunk.stats
        finally:
            if stats:
                answer.end()
                click.echo(show.speeds(stats), err=True)
        return stats

    def said(self, text: str) -> None:
        """Print nothing: scripts get new answers alone."""

    def note(self, text: str) -> None:
        click.echo(show.printable(text), err=True)

    def pairs(self, rows: Mapping[str, str]) -> None:
        self.note("\n".join(f"{left:<20} {right}" for left, right in rows.items()))

    def error(self, text: str) -> None:
        click.echo(f"Error: {show.printable(text)}", err=True)


class TerminalScreen:
    """Blocks of markdown are printed once they are final; only the last one is drawn again.

    Attributes:
        markdown: off prints the text as it comes.
        status: the line below an answer that is being written.
    """

    def __init__(self, status: Callable[[Stats], str], markdown: bool = True) -> None:
        self.console, self.markdown, self.status = Console(), markdown, status

    def answer(self, stream: Callable[[Progress], Iterable[Chunk]]) -> Stats | None:
        with _no_echo():
            return (self._formatted if self.markdown else self._as_it_comes)(stream)

    def said(self, text: str) -> None:
        text = show.printable(text)
        with _whole():
            self.console.print(MarkdownBlock(text) if self.markdown else Text(text))

    def note(self, text: str) -> None:
        with _whole():
            self.console.print(Text(show.printable(text), QUIET))

    def pairs(self, rows: Mapping[str, str]) -> None:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=20 if self.console.width >= 60 else None)
        for row in rows.items():
            table.add_row(*(Text(show.printable(cell), QUIET, overflow="fold") for cell in row))
        with _whole():
            self.console.print(table)

    def error(self, text: str) -> None:
        text = f"Error: {show.printable(text)}"
        Console(stderr=True).print(Text(text, "red"))

    def _formatted(self, stream: Callable[[Progress], Iterable[Chunk]]) -> Stats | None:
        answer = _GrowingAnswer(self.console, self.status)
        try:
            answer.start()
            for chunk in stream(answer.reading):
                answer.add(chunk)
        finally:
            answer.stop()
        return answer.stats

    def _as_it_comes(self, stream: Callable[[Progress], Iterable[Chunk]]) -> Stats | None:
        stats, answer = None, show.AnswerWriter()
        try:
            with work("reading", "tokens") as progress:
                for chunk in stream(progress):
                    answer.write(chunk.text)
                    stats = chunk.stats
        finally:
            if stats:
                answer.end()
        return stats


class _GrowingAnswer:
    """An answer being written: final blocks above, the last block and a status line below."""

    def __init__(self, console: Console, status: Callable[[Stats], str]) -> None:
        self.stats: Stats | None = None
        self._console, self._status = console, status
        self._blocks, self._printable, self._below = MarkdownBlocks(), show.Printable(), ""
        self._has_begun = False
        self._next_drawing = 0.0  # seconds, by the monotonic clock
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def start(self) -> None:
        """Begin below what is on the screen."""
        with _whole():
            self._console.print()
            self._live.start()

    def stop(self) -> None:
        """Print what still grew, and leave no status line."""
        with self._at_once():
            if self._live.is_started:
                self._live.update("", refresh=True)
                self._live.stop()
            for block in (*self._blocks.add(self._printable.end()), self._blocks.pending):
                self._print(block)

    def reading(self, done: int, total: int) -> None:
        """Say how much of the prompt is read."""
        self._below = f"reading {done:,} of {total:,} tokens"
        self._draw()

    def add(self, chunk: Chunk) -> None:
        first, self.stats = self.stats is None, chunk.stats
        self._below = self._status(chunk.stats)
        if final := self._blocks.add(self._printable.add(chunk.text)):
            with self._at_once():
                for block in final:
                    self._print(block)
        if first or time.monotonic() >= self._next_drawing:
            self._draw()

    def _print(self, block: str) -> None:
        self._console.print(self._drawn(block))
        self._has_begun = self._has_begun or bool(block.strip())

    def _drawn(self, block: str, height: int | None = None) -> MarkdownBlock:
        """Without the empty lines that an answer begins with."""
        return MarkdownBlock(block if self._has_begun else block.lstrip("\n"), height)

    def _draw(self) -> None:
        began = time.monotonic()
        parts: list[RenderableType] = []
        if self._blocks.pending.strip():
            height = max(1, self._console.height - ROWS_LEFT)
            parts += [self._drawn(self._blocks.pending, height), ""]
        status = Text(self._below, style=QUIET, no_wrap=True, overflow="ellipsis")
        with self._at_once():
            self._live.update(Group(*parts, status), refresh=True)
        now = time.monotonic()
        self._next_drawing = now + max(REDRAW_SECONDS, REDRAW_SHARE * (now - began))

    @contextmanager
    def _at_once(self) -> Iterator[None]:
        """Let terminals that know synchronized updates show no state in between."""
        with _whole():
            self._console.file.write("\x1b[?2026h")
            yield
            self._console.file.write("\x1b[?2026l")
            self._console.file.flush()


@contextmanager
def _whole() -> Iterator[None]:
    """Let Ctrl-C wait until rich has printed: else its console would buffer for ever."""
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt


@contextmanager
def _no_echo() -> Iterator[None]:
    """Hide what is typed during an answer; it waits for the next prompt."""
    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    quiet = list(before)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(handle, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSANOW, before)
