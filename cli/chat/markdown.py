"""Markdown that arrives in pieces: blocks that are final, and one that still grows."""

from __future__ import annotations

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown
from rich.segment import Segment

from mlx_kimi.cli.show import printable

# What looks like HTML is text: an answer has `std::vector<int>` in it, and no page to lay out.
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


class MarkdownBlocks:
    """Splits a growing text at its top-level blocks: paragraphs, lists, tables, code.

    Attributes:
        pending: what may still change its meaning: the last block.
    """

    def __init__(self) -> None:
        self.pending = ""

    def add(self, text: str) -> list[str]:
        """Take more text; the blocks that have become final."""
        self.pending += text
        if "\n" not in text:
            return []
        # The last line may be half a marker. A block is final once the next has begun before it.
        whole = self.pending[: self.pending.rindex("\n") + 1]
        tokens = PARSER.parse(whole)
        starts = [t.map[0] for t in tokens if t.level == 0 and t.map and t.nesting >= 0]
        lines = self.pending.split("\n")
        final = ["\n".join(lines[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
        if final:
            self.pending = "\n".join(lines[starts[-1] :])
        return final


class MarkdownBlock:
    """A block as it is printed, or its last lines while it grows beyond the screen.

    Lines end where their text does: a terminal that is made narrower would wrap padding. Links show
    where they lead, and are no escape codes.
    """

    def __init__(self, text: str, height: int | None = None) -> None:
        self._markdown = Markdown("", hyperlinks=False, code_theme="ansi_dark")
        self._markdown.parsed = PARSER.parse(text)  # (rich's own parser takes HTML, and drops it)
        self._height = height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._markdown, options.update(height=None), pad=False)
        for line in lines if self._height is None else lines[-self._height :]:
            yield from _without_padding([_printable(segment) for segment in line])
            yield Segment.line()


def _printable(segment: Segment) -> Segment:
    """As the filter of text before it was parsed: entities become any character."""
    if segment.control:
        return segment
    return Segment(printable(segment.text), segment.style)


def _without_padding(line: list[Segment]) -> list[Segment]:
    kept = list(line)
    while kept and not kept[-1].text.strip():
        kept.pop()
    if kept:
        text, style, control = kept[-1]
        kept[-1] = Segment(text.rstrip(), style, control)
    return kept
