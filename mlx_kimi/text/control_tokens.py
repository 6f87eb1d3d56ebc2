"""Control tokens that a template writes, kept apart from their spellings in what people type."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

from mlx_kimi.errors import KimiError
from mlx_kimi.user_files import Json, shown

TYPED = ("messages", "tools", "documents")  # variables that hold what people and tools wrote
COMPARED = ("role", "type")  # keys whose values templates compare
# Texts of so many characters are remembered, so many of them: each message of a chat comes again
# with every turn.
SHORT, REMEMBERED = 4096, 4096


class ControlTokens:
    """Keeps the control tokens that a template writes apart from their spellings in its data.

    Before rendering, `protect` puts a mark inside every spelling in the data; afterwards `split`
    cuts the text at the spellings that are whole, which the template wrote, and takes the marks
    out of the rest. The mark is a private-use character that no text of the chat holds.

    A spelling can also come together from two sides. So a string that ends with the beginning of
    a token, or begins with the end of one, or is a middle of one, is marked there as well. Left
    whole are middles that templates compare rather than print: `role`, `type`, keys, numbers, and
    the caller's own variables. Case does not count, as templates change it.

    What remains is a template that takes text out of the middle of a message: it could assemble a
    spelling, as it could write one.

    Args:
        names: the spellings. Those of one character have no inside to mark, and are left out.

    Attributes:
        longest: characters of the longest spelling.
    """

    def __init__(self, names: Iterable[str]) -> None:
        longest_first = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self._spelling = re.compile(pattern)
        self._spelling_in_any_case = re.compile(pattern, re.IGNORECASE)
        lower = [name.lower() for name in longest_first]
        self._joined = "\0".join(lower)
        self._starts = _Beginnings(lower)
        self._ends = _Beginnings(name[::-1] for name in lower)
        self.longest = max(map(len, lower), default=0)
        self._break_short = lru_cache(REMEMBERED)(self._break_anew)

    def protect(self, data: Mapping[str, Json], *others: str) -> tuple[dict[str, Json], str]:
        """`data` with every spelling broken, and the mark, absent from `data` and `others`.

        Args:
            data: what the template is given: messages, tools and further variables.
            others: texts that also come into the rendering: the template.

        Raises:
            KimiError: `data` nests too deeply, holds what JSON cannot, or uses every private-use
                character there is.
        """
        try:
            mark = free_character([*_strings(data), *others])
            protected = {
                name: self._protect(value, mark, whole_middles=name not in TYPED)
                for name, value in data.items()
            }
        except RecursionError:
            raise KimiError("messages: lists and objects nest too deeply") from None
        return protected, mark

    def protect_more(self, messages: Sequence[Json], mark: str) -> list[Json] | None:
        """More messages, broken by the mark of those before; None if they hold it.

        Raises:
            KimiError: as of `protect`.
        """
        try:
            if holds(_strings(messages), mark):
                return None
            return [self._protect(message, mark, whole_middles=False) for message in messages]
        except RecursionError:
            raise KimiError("messages: lists and objects nest too deeply") from None

    def split(self, text: str, mark: str = "") -> Iterator[tuple[str, bool]]:
        """Ordinary text without marks (False) and whole control tokens (True), in order."""
        end = 0
        for found in self._spelling.finditer(text):
            yield _without(text[end : found.start()], mark), False
            yield found.group(), True
            end = found.end()
        yield _without(text[end:], mark), False

    def ends(self, text: str, start: int) -> list[int]:
        """Where the whole control tokens of `text` end, from place `start` on."""
        return [found.end() for found in self._spelling.finditer(text, start)]

    def cuts(self, text: str) -> list[int]:
        """Places inside `text` that break every spelling in it, overlapping ones too."""
        return _places_inside(self._spelling, text)

    def _protect(self, data: Json, mark: str, whole_middles: bool) -> Json:
        if isinstance(data, str):
            return self._break(data, mark, whole_middles)
        if isinstance(data, Mapping):
            return {
                self._break(name, mark, whole_middles=True): self._protect(
                    value, mark, whole_middles or name in COMPARED
                )
                for name, value in data.items()
            }
        if isinstance(data, (list, tuple)):
            return [self._protect(item, mark, whole_middles) for item in data]
        return data

    def _break(self, text: str, mark: str, whole_middles: bool) -> str:
        form = self._break_short if len(text) <= SHORT else self._break_anew
        return form(text, mark, whole_middles)

    def _break_anew(self, text: str, mark: str, whole_middles: bool) -> str:
        places = set(_places_inside(self._spelling_in_any_case, text))
        # Templates strip white space: what counts is the text without it.
        core = text.strip()
        first = len(text) - len(text.lstrip())
        last = first + len(core)
        shortened = range(1, min(self.longest, len(core) + 1))
        if any(core[:n].lower()[::-1] in self._ends for n in shortened):
            places.add(first)
        if any(core[-n:].lower() in self._starts for n in shortened):
            places.add(last)
        is_short = 0 < len(core) < self.longest
        if is_short and not whole_middles and core.lower() in self._joined:
            places.add(last)
        return _with_marks(text, mark, sorted(places)) if places else text


class _Beginnings:
    """What names begin with and go on after. Takes the memory of the names."""

    def __init__(self, names: Iterable[str]) -> None:
        self._sorted = sorted(names)

    def __contains__(self, text: str) -> bool:
        # What is greater than `text` and begins with it follows it at once.
        at = bisect_right(self._sorted, text)
        return at < len(self._sorted) and self._sorted[at].startswith(text)


def _places_inside(spelling: re.Pattern[str], text: str) -> list[int]:
    places = []
    found = spelling.search(text)
    while found:
        places.append(found.start() + 1)
        found = spelling.search(text, found.start() + 1)
    return places


def _with_marks(text: str, mark: str, places: list[int]) -> str:
    return mark.join(text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True))


def _without(text: str, mark: str) -> str:
    if not mark:
        return text
    return text.replace(mark, "").replace(_escape(mark), "")  # a template may write ASCII JSON


def _escape(character: str) -> str:
    return json.dumps(character)[1:-1]


def free_character(texts: Iterable[str]) -> str:
    r"""A private-use character that is in none of `texts`, nor is its `\uXXXX` escape.

    Raises:
        KimiError: every one of the 137,468 is used.
    """
    used, escapes = set[str](), set[str]()
    for text in texts:
        used.update(text)
        if "\\u" in text:
            escapes.update(re.findall(r"\\u[0-9a-f]{4}", text))
    for first, last in ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD)):
        for code in range(first, last + 1):
            if chr(code) not in used and _escape(chr(code))[:6] not in escapes:
                return chr(code)
    raise KimiError("messages: the text uses every private-use character, so none can mark it")


def holds(texts: Iterable[str], mark: str) -> bool:
    """Whether a mark, or its escape, is in one of them: `free_character` would not choose it."""
    escape = _escape(mark)[:6]
    return any(mark in text or escape in text for text in texts)


def _strings(data: Json) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for name, value in data.items():
            if not isinstance(name, str):
                raise KimiError(f"messages: keys must be strings, but one is {shown(name)}")
            yield name
            yield from _strings(value)
    elif isinstance(data, (list, tuple)):
        for item in data:
            yield from _strings(item)
    elif data is not None and not isinstance(data, (bool, int, float)):
        raise KimiError(f"messages: values must be JSON, but one is {shown(data)}")
