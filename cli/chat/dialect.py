"""The markdown that answers are read as: what a terminal can show without changing what it says.

Headings, bullets, numbers and quotes stay as they are written: style and indentation shape them.
Marks disappear only around `code`, **bold**, *italic* and _italic_ text, in fences, in tables, and
where a line of dashes becomes one. HTML, entities, links, escapes and mathematics are text, and so
are underscores within words and double ones: `snake_case`, `__init__`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock, heading, hr, list_block, paragraph, table
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

DEEPEST = 40  # nested blocks, two for a list: beyond, a list is text
Rule = Callable[[StateBlock, int, int, bool], bool]

# Stars are marks beside spaces and punctuation, or in a script that is written without spaces.
# Beside other letters, digits and operators they are products, powers, patterns or pointers.
NO_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2010-\u205e\u2600-\u27bf\u2e80-\ua4cf"
    "\uac00-\ud7af\uf900-\ufaff\ufe0f\uff00-\uffef\U0001f300-\U0001faff\U00020000-\U0003ffff"
)
BEFORE = rf"""(?<![^\s(\["'\-:,|{NO_SPACES}])"""
AFTER = rf"""(?![^\s)\]"'\-:,|.;!?{NO_SPACES}])"""
# `int *a; char* b`, twice the star too, has the form of emphasis, and so has `2 *pi* r`.
BOLD = r"(?=\S)(?:(?!\*\*(?!\*))[^\n;])+(?<!\s)(?<!\bchar)(?<!\bint)(?<!\bvoid)(?<!\bfloat)"
WORDS = r"[^\W\d_]{2,}(?:['’\- ][^\W\d_]+)*[.!?…]?"
NO_OPERAND = r"(?<![\d=+\-*/^)]\s)"
STARS = re.compile(
    rf"{BEFORE}(?:(?P<bold>\*\*\*|\*\*)(?P<strong>{BOLD})(?P=bold)"
    rf"|{NO_OPERAND}\*(?P<em>{WORDS})\*){AFTER}"
)
# An underscore beside a letter or digit belongs to a name, as CommonMark says. It takes one between
# brackets or other signs for emphasis, too; LaTeX and templates have those.
UNDERSCORES = re.compile(
    r"""(?<![^\s(\["'\-:,|*])_(?P<em>[^\W_]+(?:[ _'’\-][^\W_]+)*[.!?…]?)_(?![^\s)\]"'\-:,|.;!?*])"""
)
MATH = re.compile(
    r"\\\((?:(?!\\\().)*?\\\)|\\\[(?:(?!\\\[).)*?\\\]"
    r"|\$\$(?:(?!\$\$).)*\$\$|\$(?![\s$])[^$\n]*(?<!\s)\$(?!\d)",
    re.DOTALL,
)


def parse(text: str) -> list[Token]:
    """Blocks of `text`. A paragraph, heading or table holds its lines as they are written."""
    return _PARSER.parse(text)


def parse_inline(text: str) -> list[Token]:
    """A line's tokens: `text`, `code_inline`, and `emphasis` around others, its tag the style."""
    return _PARSER.parseInline(text)[0].children or []


def cells(row: str) -> list[str]:
    """What stands in a table's row."""
    row = row.strip().removeprefix("|")
    parts = re.split(r"(?<!\\)\|", row)
    return [part.replace("\\|", "|").strip() for part in (parts[:-1] if not parts[-1] else parts)]


def _as_written(rule: Rule, state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A paragraph or heading with its marks, its line breaks and its indentation."""
    if not rule(state, start, end, silent):
        return False
    if not silent:
        state.tokens[-2].content = _lines(state, start)
    return True


def _table(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A table with all its cells: the usual rule drops those beyond the header's number."""
    before = len(state.tokens)
    if not table(state, start, end, silent):
        return False
    if not silent:
        del state.tokens[before:]
        token = state.push("table", "table", 0)
        token.content, token.map = _lines(state, start), [start, state.line]
    return True


def _list(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    return state.level < DEEPEST and list_block(state, start, end, silent)


def _dashes(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A line across the screen; `___` is a gap to be filled in, and `***` may be anything."""
    return _lines(state, start, start + 1).startswith("-") and hr(state, start, end, silent)


def _lines(state: StateBlock, start: int, end: int | None = None) -> str:
    return state.getLines(start, end or state.line, state.blkIndent, False).rstrip()


def _emphasis(state: StateInline, silent: bool) -> bool:
    marks = STARS if state.src[state.pos] == "*" else UNDERSCORES
    found = marks.match(state.src, state.pos, state.posMax)
    if not found:
        return False
    bold = found.groupdict().get("bold") or ""
    if not silent:
        style = {"": "italic", "**": "bold", "***": "bold italic"}[bold]
        state.push("emphasis_open", style, 1)
        rest = state.posMax
        state.pos, state.posMax = found.span("strong" if bold else "em")
        state.md.inline.tokenize(state)
        state.posMax = rest
        state.push("emphasis_close", style, -1)
    state.pos = found.end()
    return True


def _math(state: StateInline, silent: bool) -> bool:
    found = MATH.match(state.src, state.pos, state.posMax)
    if not found:
        return False
    if not silent:
        state.pending += found[0]
    state.pos = found.end()
    return True


def _parser() -> MarkdownIt:
    parser = MarkdownIt("zero", {"maxNesting": 2 * DEEPEST})
    parser.enable(["code", "fence", "hr", "list", "heading", "table", "backticks"])
    rules = parser.block.ruler
    rules.at("paragraph", partial(_as_written, paragraph))
    # What ends what: a table ends where a quote would.
    rules.at("heading", partial(_as_written, heading), {"alt": ["paragraph", "blockquote"]})
    rules.at("table", _table, {"alt": ["paragraph"]})
    rules.at("list", _list, {"alt": ["paragraph", "blockquote"]})
    rules.at("hr", _dashes, {"alt": ["paragraph", "blockquote", "list"]})
    parser.inline.ruler.before("backticks", "math", _math)
    parser.inline.ruler.push("emphasis", _emphasis)
    return parser


_PARSER = _parser()
