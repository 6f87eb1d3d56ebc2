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
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from .arrays import as_array
from .compiler import CompileError, clang
from .msl import Input, MetalText, metal_text
from .report import place
from .reserved import reserved_words
from .reviewer import Remark, review
from .syntax_tree import refusals
from .translate import translate

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
        _lint_text(name, metal)

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


def _lint_text(name: str, metal: MetalText) -> None:
    buffers = sum(not parameter.attribute for parameter in metal.parameters)
    if buffers > MOST_BUFFERS:
        raise LintError(f"{name}: {buffers} buffers, Metal allows {MOST_BUFFERS}")
    text = translate(metal).text
    for version in VERSIONS if "__METAL_VERSION__" in text else VERSIONS[:1]:
        problems = _problems(text, version)
        if problems:
            raise LintError("\n".join(f"{name}: {_placed(line, metal)}" for line in problems))


@cache
def _problems(text: str, version: int) -> list[str]:
    """As `kernel.cl:LINE: message`."""
    if reserved := list(reserved_words(text, SOURCE)):
        return reserved
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / SOURCE
        source.write_text(text)
        try:
            tree = clang(source, (*STRICT, f"-D__METAL_VERSION__={version}"), *_TREE)
        except CompileError as error:
            return _errors(str(error))
        return list(refusals(tree, source))


def _errors(messages: str) -> list[str]:
    """Those of the text itself, or else the one of the library with the place that led to it."""
    own = re.findall(r"kernel\.cl:\d+:.*error:.*", messages)
    if own:
        return own
    where = re.search(r"kernel\.cl:\d+:\d+: ", messages)
    what = re.search(r"error:.*", messages)
    return [where[0] + what[0]] if where and what else [messages]


def _placed(problem: str, metal: MetalText) -> str:
    """The line as its author knows it."""
    return re.sub(r"kernel\.cl:(\d+)", lambda found: place(int(found[1]), metal), problem)


def _each(*sets: set[str]) -> Iterator[set[str]]:
    """Each set once."""
    seen: list[set[str]] = []
    for each in sets:
        if each not in seen:
            seen.append(each)
            yield each
