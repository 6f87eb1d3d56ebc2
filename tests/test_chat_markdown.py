"""Nothing of an answer is lost on the screen: what is drawn is compared with the text."""

import io
import re
from collections import Counter
from itertools import accumulate, zip_longest
from random import Random

import pyte
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style

from mlx_kimi.cli import show
from mlx_kimi.cli.chat.dialect import parse, parse_inline
from mlx_kimi.cli.chat.markdown import MarkdownBlock, MarkdownBlocks

# What is drawn that no text has here.
LINE = "─"
FRAGMENTS = [
    # code
    *("a*b*c", "2 * 3 * 4", "int *a; char* b", "int **a, char** b", "f(**kw, **more)", "2**3**4"),
    *("std::vector<int>", "List<String>", "x = `date`", "#include <x>", ">>> print(1)", "a || b"),
    *(
        "if (a && !b) { *p = &q; }",
        "__init__",
        "_x_",
        "snake_case_name",
        "a_{b}_c",
        "src/**/*.py",
        "C:\\n",
    ),
    *("    indented", "\tx", "```", "```python", "~~~", "```` a", "`", "``", "`a`", "`` ` ``"),
    # HTML and entities
    *("<think>", "</think>", "<svg", "<br/>", "<!-- x -->", "<a href='x'>", "&lt;", "&#8238;", "&"),
    # LaTeX
    *(r"\(a_b\)", r"\[ x^{2} \]", r"\frac{1}{2}", "$a*b$", "$$", r"\\", r"\begin{align}", "a & b"),
    # markdown
    *("# h", "## h ##", "#", "- ", "* ", "+ ", "1. ", "2024. ", "> ", "---", "- - -", "***", "___"),
    *("**bold**", "*it*", "*two words*", "***both***", "**a *it* b**", "**", "*", "~~x~~", r"\*"),
    *(
        "| a | b |",
        "|---|:-:|",
        "| 1 | 2 | 3 |",
        r"| a\|b |",
        "===",
        "[x](http://y)",
        "[x]: http://y",
    ),
    *("![i](u)", "<http://x>", "- [ ] task", "**Note:**", "(**x**)", "  ", "    ", "  - "),
    # Unicode
    *(
        "é",
        "e\u0301",
        "这是**重要**的",
        "日本語",
        "👩\u200d👧",
        "\u202e",
        "\u200b",
        "α*β*γ",
        "\x1b[31m",
    ),
    *("\r\n", "\r", "\x00", "\u2028", "‘’“”", "ภาษา**ไทย**", "\U0001d465", "\u00a0", "\u3000"),
    *("word", "another", ".", ", ", " ", " ", " "),
]
ANY = st.text(st.characters(exclude_characters="─"), max_size=6)
LINES = st.lists(st.sampled_from(FRAGMENTS) | ANY, min_size=1, max_size=4).map("".join)
BLOCKS = ["", "", "| a | b |\n|---|---|", "```\nx  y\n```", "- x", "  - y", "1. z", "    w", "---"]
TEXT = st.lists(LINES | st.sampled_from(BLOCKS), max_size=12).map("\n".join)
WIDTH = st.integers(20, 100)
Cell = tuple[str, Style]


def console(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system="standard")


def drawn(text: str, width: int) -> list[list[Cell]]:
    """The lines of a block, character by character."""
    screen = console(width)
    lines = screen.render_lines(MarkdownBlock(text), pad=False)
    return [[(c, part.style or Style()) for part in line for c in part.text] for line in lines]


def shown(text: str, width: int = 200) -> str:
    return "\n".join("".join(c for c, _ in line) for line in drawn(show.printable(text), width))


def split(text: str, rng: Random) -> list[str]:
    """Its blocks, as it comes in pieces."""
    blocks, filtered, final = MarkdownBlocks(), show.Printable(), []
    while text:
        size = rng.randint(1, 7)
        final += blocks.add(filtered.add(text[:size]))
        text = text[size:]
    return [*final, *blocks.add(filtered.end()), blocks.pending]


FENCE = re.compile(r"^[\s\-*+.)\d]*(```|~~~)")
DASHES = re.compile(r"^[\s*+.)\d]*(-[ \t]*){3,}$")


def missing(text: str, lines: list[list[Cell]]) -> str:
    """Where a character of `text` is neither on the screen nor a mark; empty if nowhere.

    A mark is told by what it did: beside a star that is gone the screen is bold or italic. All ways
    to lay the text onto the screen are followed, since a mark may look like what is beside it.
    """
    cells = [cell for line in lines for cell in line if not cell[0].isspace()]
    cells = [c for c, after in zip_longest(cells, cells[1:]) if c[0] != LINE or c != after]
    reached = {0}  # how many cells the text up to here may have taken
    for line in text.split("\n"):
        for column, char in enumerate(line):
            if char.isspace():
                continue
            around = (" " + line + " ")[column : column + 3]
            before, reached = reached, set()
            for at in before:
                if at < len(cells) and cells[at][0] == char:
                    reached.add(at + 1)
                beside = [style for _, style in cells[max(at - 1, 0) : at + 1]]
                if _is_mark(char, around, line, beside):
                    reached.add(at)
            if not reached:
                at = max(before)
                return f"{char!r} of {line!r}, where {cells[at : at + 5]} is shown"
        if DASHES.match(line):  # (several in a row look like one)
            reached |= {at + 1 for at in reached if at < len(cells) and cells[at][0] == LINE}
    return "" if len(cells) in reached else f"{cells[max(reached) :]} is shown and not said"


def _is_mark(char: str, around: str, line: str, beside: list[Style]) -> bool:
    match char:
        case "`":
            is_code = any(style.color and style.color.name == "cyan" for style in beside)
            return is_code or bool(FENCE.match(line))
        case "~":
            return bool(FENCE.match(line))
        case "-":
            return bool(DASHES.match(line))
        case "*":
            within = around[0].isalnum() and around[2].isalnum() and around.isascii()
            alone = around[0].isspace() and around[2].isspace()
            return any(s.bold or s.italic for s in beside) and not within and not alone
        case "_":
            within = around[0].isalnum() and around[2].isalnum()
            return any(s.italic for s in beside) and not within
    return False


def has_table(text: str) -> bool:
    return any(token.type == "table" for token in parse(text))


@settings(max_examples=400, deadline=None)
@given(TEXT, WIDTH)
@example("int *a; char* b", 80)
@example("```\n\n  a\tb  c\n```", 20)
@example("> " * 200 + "a", 40)
@example("- " * 200 + "a", 40)
@example("\u200d" * 30, 20)
def test_every_character_is_on_the_screen(text: str, width: int) -> None:
    text = show.printable(text)
    lines = drawn(text, width)
    assert all(len(line) == 0 or _cells(line) <= width for line in lines)
    if has_table(text):  # lines of columns beside each other are mixed
        gone = Counter("".join(text.split())) - Counter(c for line in lines for c, _ in line)
        assert not set(gone) - set("|-:\\*_`~")
    else:
        assert not missing(text, lines)


def _cells(line: list[Cell]) -> int:
    return cell_len("".join(c for c, _ in line))


@settings(max_examples=200, deadline=None)
@given(TEXT, WIDTH, st.integers(0, 1000))
def test_what_comes_in_pieces_looks_as_what_comes_at_once(text: str, width: int, seed: int) -> None:
    """Final blocks are printed before the next is known."""
    pieces = split(text, Random(seed))
    whole = show.printable(text)
    assert "".join(pieces) == whole
    assert [line for piece in pieces for line in drawn(piece, width)] == drawn(whole, width)


CELLS = st.lists(
    st.text("ab ,漢", max_size=40).map(lambda cell: f" {cell} "), min_size=1, max_size=9
)


@settings(max_examples=100, deadline=None)
@given(CELLS, st.lists(CELLS, max_size=4), WIDTH)
def test_a_table_of_any_width_holds_all_its_cells(
    header: list[str], rows: list[list[str]], width: int
) -> None:
    """Rows may have more cells than the header; columns may not fit beside each other."""
    dashes = ["-" for _ in header]
    text = "\n".join("|" + "|".join(row) + "|" for row in (header, dashes, *rows))
    assert has_table(text)
    lines = drawn(text, width)
    assert all(_cells(line) <= width for line in lines)
    said = Counter(c for row in (header, *rows) for cell in row for c in cell if c != " ")
    assert Counter(c for line in lines for c, _ in line if c in "ab,漢") == said


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab _<>&\\()[]{}$^=/.,:;!?'\"", max_size=30), min_size=1, max_size=5))
def test_text_without_marks_is_shown_as_it_is(lines: list[str]) -> None:
    """With its spaces and line breaks."""
    lines = [line.rstrip() for line in lines]
    assume(lines[0] and all(lines))
    assert shown("\n".join(lines), 100) == "\n".join(lines)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text("ab *_`<>&\\|#-", max_size=30), max_size=6),
    st.sampled_from(["c", "", "xml", "no-language"]),
)
def test_code_is_shown_as_it_is(lines: list[str], language: str) -> None:
    code = [line.rstrip() for line in lines]
    assume(not any(line.strip().startswith("```") for line in code))
    text = "\n".join([f"```{language}", *code, "```"])
    label = [f"  {language}"] if language else []
    expected = [*label, *(f"  {line}".rstrip() for line in (code or [""]))]
    assert shown(text, 80).split("\n") == expected


# Text that looks like marks or HTML.
AS_WRITTEN = [
    "A std::vector<int> and a List<String>.",
    "<think>\nfirst this\n</think>\nthen that",
    'a line\n<svg width="3">\nanother line',
    "<!-- a comment --> and <br/> and <a href='x'>y</a>",
    "- of a list: Map<K, V>\n- <script>alert(1)</script>",
    *("a*b*c", r"\(a_b\)", "2 * 3 * 4", "int *a; char* b", "int **a; char** b", "2 *pi* r"),
    *("int *a, char* b", "int **a, char** b", "x**2 + y**2", "α*β*γ", "f(*args, **kw)"),
    *(
        "snake_case and _leading",
        "__init__ and a_b_c",
        "~~gone~~",
        "&lt;b&gt; &#8238;",
        r"\*not bold\*",
        r"$a *bc* d$",
    ),
    *("[name](http://evil)", "[a]: http://x", "![alt](src)", "<http://x>", "***", "___", "==="),
    *(
        "# a heading # with C #",
        "#include <x>",
        "> a quote\n> on",
        ">>> 1 + 1",
        ">>>>>>> branch",
    ),
    *("7. seven\n9. nine", "x = a\n- b\n+ c\n* d", "a\n---b", "src/**/*.py and *.c", "a | b"),
    *("   /\\\n  /  \\\n /____\\", "two  spaces   stay", "a \\\\\nb \\\\", "1986. A year."),
    "\\begin{align}\n  a &= b \\\\\n  c &= d\n\\end{align}",
]


@pytest.mark.parametrize("text", AS_WRITTEN)
def test_it_is_shown_as_it_is_written(text: str) -> None:
    """`std::vector<int>` was shown as `std::vector`, `a*b*c` as `abc`, `\\(a_b\\)` as `(a_b)`."""
    assert shown(text) == text
    assert not any(style.italic for line in drawn(text, 200) for _, style in line)


@pytest.mark.parametrize(
    ("text", "looks"),
    [
        ("a **bold one** and *an italic one*.", "a bold one and an italic one."),
        ("**Note:** x, (**y**), **a `b` c**; **x = 5**", "Note: x, (y), a b c; x = 5"),
        (
            "***both*** and **one *within* it** and **at the *end***",
            "both and one within it and at the end",
        ),
        ("_x_, **_two words_** and (_snake_case_).", "x, two words and (snake_case)."),
        ("这是**重要**的。**注意：**ภาษา**ไทย**", "这是重要的。注意：ภาษาไทย"),
        ("`a*b` and ``a`b``", "a*b and a`b"),
        ("a\r\nb\r\n\r\nc", "a\nb\n\nc"),
        ("~~~ sh\na  b\n~~~\nc", "  sh\n  a  b\nc"),
        ("a\n\n\n\nb\n", "a\n\nb"),
        ("- a\n\n- b\n    1. c\n2) d", "- a\n\n- b\n  1. c\n2) d"),
        ("| a | b |\n|--:|---|\n| 1 | 2 | 3 |", "a   b\n─────────\n1   2   3"),
        (r"| a\|b |" + "\n|---|", "a|b\n───"),
    ],
)
def test_marks_of_markdown_are_style(text: str, looks: str) -> None:
    assert "\n".join(line.rstrip() for line in shown(text).split("\n")) == looks


NAME = st.from_regex(r"_?[a-z5é]{1,2}(_[a-z5é]{1,2}){0,2}_?[.]?", fullmatch=True)


@settings(max_examples=300, deadline=None)
@given(st.lists(NAME, min_size=1, max_size=4).map(" ".join))
@example("snake_case_names and _x_, _snake_case_")
@example("_two words_ a_b _c_.")
@example("_open _x_ open_ é_é_")
def test_what_underscores_make_italic_is_so_in_commonmark(text: str) -> None:
    def italic(tokens: list[Token], mark: str) -> str:
        depths = accumulate(token.nesting * (token.type.startswith(mark)) for token in tokens)
        pairs = zip(tokens, depths, strict=True)
        return "".join(c.upper() if d else c for token, d in pairs for c in token.content)

    ours = italic(parse_inline(text), "emphasis")
    theirs = italic(MarkdownIt("commonmark").parseInline(text)[0].children or [], "em")
    assert ours == theirs or ours.count("_") > theirs.count("_")


def test_code_is_marked_where_there_is_no_colour() -> None:
    plain = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    plain.print(MarkdownBlock("kill `cat pid`"))
    assert "`cat pid`" in plain.file.getvalue()


@settings(max_examples=30, deadline=None)
@given(TEXT, st.sampled_from([40, 80]))
def test_a_terminal_shows_what_was_drawn(text: str, width: int) -> None:
    """The cells of an emulated one, for characters whose width all agree on."""
    text = "".join(c for c in show.printable(text) if c.isascii())
    screen = pyte.Screen(width, 400)
    screen.set_mode(pyte.modes.LNM)
    to = console(width)
    to.print(MarkdownBlock(text))
    pyte.Stream(screen).feed(to.file.getvalue())
    expected = ["".join(c for c, _ in line).rstrip() for line in drawn(text, width)]
    assert [line.rstrip() for line in screen.display][: len(expected)] == expected


def test_deep_and_long_blocks_are_drawn() -> None:
    for text in (">" * 5000, "- " * 5000, "*a " * 5000, r"\( " * 5000, "`" * 5000, "**a " * 5000):
        assert not missing(text, drawn(text, 80))
