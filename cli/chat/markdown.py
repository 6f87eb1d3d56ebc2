"""Markdown that arrives in pieces: blocks that are final, one that still grows; how they look."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, zip_longest

from markdown_it.token import Token
from markdown_it.tree import SyntaxTreeNode
from rich import box
from rich.cells import chop_cells
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from mlx_kimi.cli.chat.dialect import cells, parse, parse_inline

CODE, MARK = "cyan", "bold"
QUIET = "dim"  # what is no answer: no colour, which a colour scheme may hide
CODE_INDENT = 2  # cells
TAB = 4  # cells
NARROWEST = 16  # cells: what is indented beyond is not indented at all
CELL = 6  # cells of the screen that a table's needs at least; with fewer it is shown as written


class MarkdownBlocks:
    """Splits a growing text at its blocks: paragraphs, items of a list, tables, code.

    The blocks and what is pending, joined, are the text.

    Attributes:
        pending: what may still change its meaning: the last block.
    """

    def __init__(self) -> None:
        self.pending = ""

    def add(self, text: str) -> list[str]:
        """Take more text; the blocks that have become final, each after the empty lines before."""
        self.pending += text
        if "\n" not in text:
            return []
        # The last line may be half a marker. A block is final once the next has begun before it.
        whole = self.pending[: self.pending.rindex("\n") + 1]
        lines = self.pending.split("\n")
        cuts = [_without_blank_end(lines, start) for start in _starts(parse(whole))[1:]]
        if not cuts:
            return []
        self.pending = "\n".join(lines[cuts[-1] :])
        bounds = zip([0, *cuts], cuts, strict=False)
        return ["".join(f"{line}\n" for line in lines[a:b]) for a, b in bounds]


def _starts(tokens: Iterable[Token]) -> list[int]:
    """Lines at which blocks begin."""
    items = ("list_item_open",)
    lists = ("bullet_list_open", "ordered_list_open")
    return [
        token.map[0]
        for token in tokens
        if token.map
        and token.nesting >= 0
        and (token.type in items if token.level == 1 else not token.level)
        and token.type not in lists
    ]


def _without_blank_end(lines: list[str], end: int) -> int:
    while end and _is_blank(lines[end - 1]):
        end -= 1
    return end


def _is_blank(line: str) -> bool:
    return not line.strip(" \t")


class MarkdownBlock:
    """Blocks as they are printed, or their last lines while they grow beyond the screen.

    Lines end where their text does: a terminal that is made narrower would wrap padding.
    """

    def __init__(self, text: str, height: int | None = None) -> None:
        self._text, self._height = text, height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = _Drawing(console, self._text).lines(options.max_width)
        for line in lines if self._height is None else lines[-self._height :]:
            line.rstrip()
            yield from line.render(console, end="\n")


class _Drawing:
    """Draws blocks as lines of text, none wider than asked for."""

    def __init__(self, console: Console, text: str) -> None:
        self._console, self._root = console, SyntaxTreeNode(parse(text))
        self._source = text.split("\n")

    def lines(self, width: int) -> list[Text]:
        return self._blocks(self._root.children, width)

    def _blocks(self, nodes: Iterable[SyntaxTreeNode], width: int, first: int = 0) -> list[Text]:
        """Blocks below each other, an empty line between where the text from `first` on has one."""
        lines: list[Text] = []
        for node in nodes:
            if node.map and node.map[0] > first and _is_blank(self._source[node.map[0] - 1]):
                lines.append(Text())
            lines += self._block(node, width)
        return lines

    def _block(self, node: SyntaxTreeNode, width: int) -> list[Text]:
        match node.type:
            case "bullet_list" | "ordered_list":
                return self._blocks(node.children, width, node.map[0] if node.map else 0)
            case "list_item":
                return self._item(node, width)
            case "fence":
                return self._code(node.content, node.info.strip(), width)
            case "code_block":
                lines = node.content.removesuffix("\n").split("\n")
                return self._folded(Text("\n".join(f"    {line}" for line in lines), CODE), width)
            case "table":
                return self._table(node.content.split("\n"), width)
            case "hr":
                return [Text("─" * width, QUIET)]
        style = "bold" if node.type == "heading" else ""
        inline = node.children[0].token
        tokens = inline.children if inline else None
        return self._wrapped(self._inline(tokens or [], style), width)

    def _item(self, node: SyntaxTreeNode, width: int) -> list[Text]:
        mark = Text(f"{node.info}{node.markup} ", MARK)
        indent = mark.cell_len
        if width - indent < NARROWEST:
            return [mark, *self._blocks(node.children, width, node.map[0] if node.map else 0)]
        lines = self._blocks(node.children, width - indent, node.map[0] if node.map else 0)
        return _indented(lines, indent, mark) if lines else [mark]

    def _code(self, code: str, language: str, width: int) -> list[Text]:
        """Highlighted, under the name of its language; each space is where it was."""
        code = code.removesuffix("\n").expandtabs(TAB)
        name = language.partition(" ")[0]
        text = Syntax(code, name or "text", theme="ansi_dark").highlight(code)
        text.right_crop(len(text.plain) - len(code))  # (the line break that it adds)
        if text.plain != code:  # a highlighter's mistake
            text = Text(code)
        inner = width - CODE_INDENT
        label = self._wrapped(Text(language, QUIET), inner) if language else []
        return _indented([*label, *self._folded(text, inner)], CODE_INDENT)

    def _table(self, rows: list[str], width: int) -> list[Text]:
        header, dashes, *body = (cells(row) for row in rows)
        columns = max(map(len, (header, *body)))
        if columns * CELL > width:
            return self._wrapped(Text("\n".join(rows)), width)
        drawn = [[self._inline(parse_inline(cell)) for cell in row] for row in (header, *body)]
        drawn = [row + [Text()] * (columns - len(row)) for row in drawn]
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for title, mark in zip_longest(drawn[0], dashes, fillvalue=""):
            table.add_column(title, justify=_justify(mark), overflow="fold", header_style="bold")
        for row in drawn[1:]:
            table.add_row(*row)
        if table.__rich_measure__(self._console, self._console.options).maximum > width:
            table.leading = 1  # cells of several lines
        options = self._console.options.update(width=width, height=None)
        lines = self._console.render_lines(table, options, pad=False)
        return [Text.assemble(*((part.text, part.style or "") for part in line)) for line in lines]

    def _inline(self, nodes: Iterable[Token], style: str = "") -> Text:
        text, styles = Text(tab_size=TAB), [style]
        for token in nodes:
            if token.nesting > 0:
                styles.append(token.tag)
            elif token.nesting < 0:
                styles.pop()
            elif token.type == "code_inline":
                text.append(self._code_span(token), " ".join([*styles, CODE]))
            else:
                text.append(token.content, " ".join(styles))
        return text

    def _code_span(self, token: Token) -> str:
        """Its marks stay where no colour can stand for them, or there is nothing to colour."""
        is_seen = self._console.color_system and token.content.strip()
        mark = "" if is_seen else token.markup
        return f"{mark}{token.content}{mark}"

    def _wrapped(self, text: Text, width: int) -> list[Text]:
        return list(text.wrap(self._console, width, overflow="fold", tab_size=TAB))

    def _folded(self, text: Text, width: int) -> list[Text]:
        """Broken where the screen ends, not between words."""
        lines = []
        for line in text.split("\n", allow_blank=True):
            line.expand_tabs(TAB)
            parts = chop_cells(line.plain, width)
            lines += list(line.divide(accumulate(len(part) for part in parts[:-1])))
        return lines


def _justify(mark: str) -> JustifyMethod:
    """What `:-:` and the like mean."""
    if mark.endswith(":"):
        return "center" if mark.startswith(":") else "right"
    return "left"


def _indented(lines: list[Text], cells: int, first: Text | None = None) -> list[Text]:
    """`lines` after so many spaces, or the first after a mark of this width."""
    spaces = Text(" " * cells)
    return [
        Text.assemble(first if first and not number else spaces, line)
        for number, line in enumerate(lines)
    ]
