"""The files of kernels and their headers as text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

_INCLUDE = re.compile(r'^#include "(\w+\.h)"$', re.MULTILINE)
_FOR_PEOPLE = re.compile(r"[ \t]*//[^\n]*|^[ \t]+|(?<=\n)\n+", re.MULTILINE)


@cache
def text_of(file: str) -> str:
    """A file of this folder."""
    return (files(__package__) / file).read_text(encoding="utf-8")


def body_of(file: str) -> str:
    """The file with an empty line in place of each that includes a header."""
    return _INCLUDE.sub("", text_of(file))


def without_comments(text: str) -> str:
    """The text without comments, indentation and empty lines.

    MLX hashes the whole text at every launch: what only people read would cost it a microsecond.
    """
    return _FOR_PEOPLE.sub("", text)


def headers_of(file: str, instead: Mapping[str, str]) -> str:
    """The headers that a file includes, each once and after those that it includes itself.

    `instead`: files to take in place of some, {"tiles.h": "cuda_tiles.h"}.

    Raises:
        ValueError: headers include each other in a circle.
    """
    return "\n".join(map(body_of, _included(file, instead)))


def places_of_headers(file: str) -> list[str]:
    """Where each line of `headers_of` stands: vectors.h:1 and so on."""
    return [
        f"{name}:{number}"
        for name in _included(file, {})
        for number, _ in enumerate(body_of(name).split("\n"), start=1)
    ]


def _included(file: str, instead: Mapping[str, str]) -> list[str]:
    found: dict[str, None] = {}

    def visit(file: str, way: tuple[str, ...]) -> None:
        for name in _INCLUDE.findall(text_of(file)):
            header = instead.get(name, name)
            if header in way:
                raise ValueError(f"[{file}] includes must form no circle but {header} is in one.")
            if header not in found:
                visit(header, (*way, header))
                found[header] = None

    visit(file, ())
    return list(found)
