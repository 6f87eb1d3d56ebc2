"""What `lint` and `review` read: one text of C++ for OpenCL, and how its author knows its lines.

It is made of a kernel as `mx.fast.metal_kernel` takes it, or of a library, a complete Metal source
such as a `.metal` file, whose own `#include "…"` are read here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .msl import MetalText
from .report import place
from .translate import translate, translate_text

# MLX's functions of bfloat, written with Apple's builtins: the shim has them.
IN_SHIM = ("mlx/backend/metal/kernels/bf16_math.h",)
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"')
_ONCE = re.compile(r"^\s*#\s*pragma\s+once\b")
_BUFFER = re.compile(r"\[\[\s*buffer\(\s*(\d+)\s*\)")


@dataclass(frozen=True)
class Unit:
    """A translation unit."""

    text: str
    kernels: tuple[str, ...]  # the functions in question, without template values
    buffers: int  # of the kernel that has most of them
    place: Callable[[int], str]  # a line of `text` as its author knows it


def kernel_unit(metal: MetalText) -> Unit:
    buffers = sum(not parameter.attribute for parameter in metal.parameters)
    text = translate(metal).text
    return Unit(text, (metal.function,), buffers, partial(place, metal=metal))


def library_unit(source: str, kernels: Sequence[str], folders: Sequence[Path]) -> Unit:
    """`kernels`: functions as a call names them, `softmax<float, 4>` for one of a template.

    Of buffers the highest number counts, as it does in Metal.
    """
    lines = list(_included("", source, folders, set()))
    instances = "".join(f"template decltype({k}) {k};\n" for k in kernels if "<" in k)
    text = "\n".join(line for line, _ in lines) + "\n" + translate_text(instances)
    names = tuple(kernel.split("<")[0].split("::")[-1].strip() for kernel in kernels)
    missing = [name for name in names if not re.search(rf"\b{name}\s*\(", text)]
    if missing or not names:
        raise ValueError(f"[library] kernels must be functions of the source but got {kernels}")
    places = [where for _, where in lines] + list(kernels)
    buffers = 1 + max((int(n) for n in _BUFFER.findall(text)), default=-1)
    return Unit(text, names, buffers, lambda line: places[min(line, len(places)) - 1])


def _included(
    name: str, source: str, folders: Sequence[Path], read: set[str]
) -> Iterator[tuple[str, str]]:
    """Lines with their places, each included file once, as if all had `#pragma once`."""
    for number, line in enumerate(translate_text(source).split("\n"), start=1):
        where = f"{name} line {number}".strip()
        found = _INCLUDE.match(line)
        if not found:
            yield ("" if _ONCE.match(line) else line), where
        elif found[1] not in read:
            read.add(found[1])
            if found[1] not in IN_SHIM:
                file = _found(found[1], folders, where)
                yield from _included(file.name, file.read_text(), folders, read)


def _found(name: str, folders: Sequence[Path], where: str) -> Path:
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    looked = ", ".join(map(str, folders)) or "no folder"
    raise FileNotFoundError(f'{where}: #include "{name}" must be in a folder of {looked}')
