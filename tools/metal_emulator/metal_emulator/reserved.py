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
    "object_data",
    "ray_data",
    "threadgroup_imageblock",
)
_WORD = re.compile(rf"\b(?:{'|'.join(RESERVED)})\b")
_NOT_CODE = re.compile(r'"(?:\\.|[^"\\\n])*"|\[\[.*?\]\]', re.DOTALL)  # strings, attributes


def reserved_words(text: str, file: str) -> Iterator[str]:
    """`FILE:LINE: message` for each use of such a word in a text without comments."""
    code = _NOT_CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    for number, line in enumerate(code.split("\n"), start=1):
        for found in _WORD.finditer(line):
            yield f"{file}:{number}: error: '{found[0]}' is a reserved word of Metal"
