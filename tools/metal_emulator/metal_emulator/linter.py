"""What a Metal compiler would refuse in a kernel, found without running it.

C++ for OpenCL keeps address spaces apart by Metal's rules. Where a text names none, pointers,
references and `this` are generic, as in Metal 4.1: clang's diagnostics are then those of Metal 4.1.
Earlier versions know no generic space; that, and what else clang takes beyond Metal, is in its
syntax tree.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from .arrays import as_array
from .compiler import CompileError, clang
from .msl import Input, metal_text
from .reserved import reserved_words
from .reviewer import Remark, review
from .syntax_tree import refusals
from .unit import Unit, kernel_unit

SOURCE = "kernel.cl"  # the file that clang reads
MOST_BUFFERS = 31
VERSIONS = (310, 410)  # of Metal: the oldest and the newest in use
STRICT = (
    # No double, and no variables that a kernel could change at file scope.
    "-Xclang",
    "-cl-ext=-cl_khr_fp64,-__opencl_c_fp64,-__opencl_c_program_scope_global_variables,"
    "-__opencl_c_device_enqueue,-__opencl_c_pipes",
)
_TREE = ("-fsyntax-only", "-fno-color-diagnostics", "-Xclang", "-ast-dump")


class LintError(Exception):
    """What is wrong in a kernel's text, a line each."""


def lint(
    name: str,
    source: str,
    inputs: Mapping[str, mx.Dtype],
    outputs: Mapping[str, mx.Dtype],
    template: Sequence[tuple[str, Any]] = (),
    *,
    header: str = "",
    atomic_outputs: bool = False,
    scalars: Collection[str] = (),
    large: Collection[str] = (),
    strict: bool = False,
    threads: int | None = None,
) -> None:
    """Raise a LintError unless Metal 3.1 to 4.1 would take the kernel.

    Args:
        name, source, header, atomic_outputs: as `mx.fast.metal_kernel` takes them.
        inputs, outputs: the dtype of each, in order.
        template: as a call of the kernel takes it.
        scalars: the inputs that are Python numbers.
        large: the inputs that have 8 elements or more in every call. All others are tried as small
            ones too, one at a time and together: MLX puts those into another address space.
        strict: raise also for what `review` finds, which may only be slow.
        threads: of a threadgroup, as `review` takes it.
    """
    flexible = [key for key in inputs if key not in {*scalars, *large}]

    def check(small: set[str]) -> None:
        given = Input.all_of(inputs, scalars, small)
        results = list(outputs.items())
        metal = metal_text(name, given, results, source, header, template, atomic_outputs)
        lint_unit(name, kernel_unit(metal))

    with ThreadPoolExecutor() as pool:  # which wait for a process each
        list(pool.map(check, _each({*flexible}, *({key} for key in flexible), set())))
    if strict:
        how: dict[str, Any] = {"header": header, "atomic_outputs": atomic_outputs}
        how |= {"scalars": scalars, "threads": threads}
        if remarks := review(name, source, inputs, outputs, template, **how):
            raise LintError("\n".join(map(str, remarks)))


def lint_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: Any = None,
    *,
    large: Collection[str] = (),
    remarks: list[Remark] | None = None,
) -> Callable[..., list[mx.array]]:
    """Stands in for `mx.fast.metal_kernel`: a call is linted for its dtypes, and answers zeros.

    `remarks`: a list that also gets what `review` finds, for the threads of the call.
    """

    def launch(
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        threadgroup: Sequence[int] = (1,),
        template: Sequence[tuple[str, Any]] = (),
        **_: Any,
    ) -> list[mx.array]:
        arrays = dict(zip(input_names, map(as_array, inputs), strict=True))
        types = (
            {key: x.dtype for key, x in arrays.items()},
            dict(zip(output_names, output_dtypes, strict=True)),
        )
        how: dict[str, Any] = {"header": header, "atomic_outputs": atomic_outputs}
        how["scalars"] = {key for key, x in arrays.items() if x.ndim == 0}
        lint(name, source, *types, template, **how, large=large)
        if remarks is not None:
            threads = prod(threadgroup)
            found = review(name, source, *types, template, **how, threads=threads)
            remarks.extend(remark for remark in found if remark not in remarks)
        return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

    return launch


def lint_unit(name: str, unit: Unit) -> None:
    if unit.buffers > MOST_BUFFERS:
        raise LintError(f"{name}: {unit.buffers} buffers, Metal allows {MOST_BUFFERS}")
    versions = VERSIONS if "__METAL_VERSION__" in unit.text else VERSIONS[:1]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(partial(_problems, unit.text), versions))
    for problems in found:
        if problems:
            raise LintError("\n".join(f"{name}: {_placed(line, unit)}" for line in problems))


@cache
def _problems(text: str, version: int) -> list[str]:
    """As `kernel.cl:LINE: message`."""
    define = f"-D__METAL_VERSION__={version}"
    if reserved := _read_by_metal(list(reserved_words(text, SOURCE)), text, define):
        return reserved
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / SOURCE
        source.write_text(text)
        try:
            tree = clang(source, (*STRICT, define), *_TREE)
        except CompileError as error:
            return _errors(str(error))
        return list(refusals(tree, source, version))


def _read_by_metal(problems: list[str], text: str, define: str) -> list[str]:
    """Without those in branches of `#if` that are for others: an `#error` there is not reached."""
    if not problems:
        return []
    lines = text.split("\n")
    numbers = [int(problem.split(":")[1]) for problem in problems]
    for number in numbers:
        start = number
        while start > 1 and lines[start - 2].endswith("\\"):  # a macro of several lines
            start -= 1
        lines[start - 1] = f"#error line {number}\n{lines[start - 1]}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / SOURCE
        source.write_text("\n".join(lines))
        try:
            clang(source, (*STRICT, define), "-E", "-ferror-limit=0")
        except CompileError as error:
            reached = {int(number) for number in re.findall(r"error: line (\d+)", str(error))}
            return [x for x, number in zip(problems, numbers, strict=True) if number in reached]
    return []


def _errors(messages: str) -> list[str]:
    """Those of the text itself, or else the one of the library with the place that led to it."""
    own = re.findall(r"kernel\.cl:\d+:.*error:.*", messages)
    if own:
        return own
    where = re.search(r"kernel\.cl:\d+:\d+: ", messages)
    what = re.search(r"error:.*", messages)
    return [where[0] + what[0]] if where and what else [messages]


def _placed(problem: str, unit: Unit) -> str:
    """The line as its author knows it."""
    return re.sub(r"kernel\.cl:(\d+)", lambda found: unit.place(int(found[1])), problem)


def _each(*sets: set[str]) -> Iterator[set[str]]:
    """Each set once."""
    seen: list[set[str]] = []
    for each in sets:
        if each not in seen:
            seen.append(each)
            yield each
