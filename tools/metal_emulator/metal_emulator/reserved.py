"""Words that the Metal language keeps for itself and clang's C++ for OpenCL does not."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Stages and address spaces of graphics, and words of C that Metal keeps as OpenCL did. None has a
# place in the text of a compute kernel, but for [[kernel]]. What C++ reserves, and `half`, clang
# refuses by itself; `bfloat`, a type here, is looked for among the names that are declared.
RESERVED = (
    "kernel",
    "vertex",
    "fragment",
    "quad",
    "complex",
    "imaginary",
    "llong",
    "ullong",
    "object_data",
    "ray_data",
    "threadgroup_imageblock",
)
# Words with a place in a kernel's text. clang, for which some are types or macros of the library,
# lets a macro, a label or a value of a template take their names.
USED = ("bfloat", "half", "device", "constant", "thread", "threadgroup", "register")
_WORD = re.compile(rf"\b(?:{'|'.join(RESERVED)})\b")
_TAKEN = re.compile(
    rf"^\s*#\s*define\s+(?P<macro>{'|'.join(USED)})\b"
    rf"|(?:^|[;{{}}])\s*(?P<label>{'|'.join(USED)})\s*:(?!:)"
    rf"|\b(?:bool|char|short|int|uint|size_t)\s+(?P<value>{'|'.join(USED)})\s*[,>=]"
)
_NOT_CODE = re.compile(r'"(?:\\.|[^"\\\n])*"|\[\[.*?\]\]', re.DOTALL)  # strings, attributes


def reserved_words(text: str, file: str) -> Iterator[str]:
    """`FILE:LINE: message` for each use of such a word in a text without comments."""
    code = _NOT_CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    for number, line in enumerate(code.split("\n"), start=1):
        words = [found[0] for found in _WORD.finditer(line)]
        words += [found[found.lastgroup or 0] for found in _TAKEN.finditer(line)]
        for word in words:
            yield f"{file}:{number}: error: '{word}' is a reserved word of Metal"
