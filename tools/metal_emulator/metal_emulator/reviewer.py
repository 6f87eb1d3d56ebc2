"""What a Metal compiler takes, and may make slow, or may refuse on some machines.

Unlike what `lint` finds, none of it is certain: it is what clang's optimizer does to the same text,
and limits that not every GPU has.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .msl import Input, metal_text
from .optimized import VALUE, Function, Module, modules, without_debug
from .registers import registers
from .unit import Unit, kernel_unit

BUFFERS = 24  # of Metal's 31: leaves room for those that its validation layer may add
# 32-bit registers of a threadgroup and of a thread on M1 and M2, assumed: 104 for 512 threads.
REGISTERS, MOST_REGISTERS = 53248, 128

_ENTRY = "emu_entry"
# Arrays and structures: clang also keeps a lone value there, as this processor hands over vectors.
_ALLOCA = re.compile(r"^  (%[\w.$-]+) = alloca ([\[{%][^,]*)")
_CALL = re.compile(r"\bcall .*?@([\w.$]+)\(")
_DEBUG = re.compile(r"!dbg (!\d+)")
_COMPONENT = re.compile(r"= (?:extract|insert)element .*, i\d+ %[\w.$-]+$")  # the last is the index
_ARRAY_ALIAS = re.compile(r"\busing\s+(\w+)\s*=[^;]*\]\s*;|\btypedef\b[^;{}]*?\b(\w+)\s*\[[^;]*;")
_SPACES = r"\b(?:thread|threadgroup|device|constant)\b"


@dataclass(frozen=True)
class Remark:
    """What may be slow or refused: `where` is "line 3" of the body, or "header line 3"."""

    kernel: str
    where: str
    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.where}: {self.what}: {self.why}"


def review(
    name: str,
    source: str,
    inputs: Mapping[str, mx.Dtype],
    outputs: Mapping[str, mx.Dtype],
    template: Sequence[tuple[str, Any]] = (),
    *,
    header: str = "",
    atomic_outputs: bool = False,
    scalars: Collection[str] = (),
    small: Collection[str] = (),
    threads: int | None = None,
) -> list[Remark]:
    """What may be slow in a kernel, or refused by some machines; arguments as of `lint`.

    Args:
        small: the inputs of under 8 elements.
        threads: how many a threadgroup has; without it, registers are not compared.

    Raises:
        CompileError: clang refuses the text; `lint` says it in fewer words.
    """
    given = Input.all_of(inputs, scalars, small)
    results = list(outputs.items())
    metal = metal_text(name, given, results, source, header, template, atomic_outputs)
    return review_unit(name, kernel_unit(metal), threads)


def review_unit(name: str, unit: Unit, threads: int | None) -> list[Remark]:
    return list(dict.fromkeys(_remarks(name, unit, threads)))


def _remarks(name: str, unit: Unit, threads: int | None) -> Iterator[Remark]:
    if unit.buffers > BUFFERS:
        why = f"Metal has 31, and its validation layer may add some: {BUFFERS} leave room"
        yield Remark(name, "signature", f"{unit.buffers} buffers", why)
    written, optimized = modules(unit.text, unit.kernels)
    noted = [*_aliases(unit.text), *_helpers(written, optimized, unit)]
    for function in optimized.functions.values():
        if function.symbol != _ENTRY:
            noted += [*_arrays(function, optimized, unit), *_components(function, optimized)]
    for line, what, why in noted:
        yield Remark(name, unit.place(line), what, why)
    if threads:
        yield from _registers(name, unit, optimized, threads)


Noted = tuple[int, str, str]  # line of the text, what, why


def _aliases(text: str) -> Iterator[Noted]:
    """Address spaces before the name of an array type: that of the array, or of its elements?"""
    for name in sorted({first or second for first, second in _ARRAY_ALIAS.findall(text)}):
        spaced = re.compile(rf"{_SPACES}\s+(?:const\s+)?{name}\b|\b{name}\s+(?:const\s+)?{_SPACES}")
        for number, line in enumerate(text.split("\n"), start=1):
            if spaced.search(line):
                why = f"'{name}' is an array type, to which not every compiler applies one"
                yield number, "address space on an alias", why


def _helpers(written: Module, optimized: Module, unit: Unit) -> Iterator[Noted]:
    for symbol, function in written.functions.items():
        if symbol == _ENTRY or _is_kernel(function, unit) or function.forced:
            continue
        why = "a compiler may leave it a call"
        if symbol in optimized.functions:
            why = "clang leaves it a call"
        if "CLprivate" in symbol or "CLgeneric" in symbol:
            why += ", and what it is given of a thread's own then stays in memory"
        yield function.line, f"'{function.plain_name}' is not forced inline (METAL_FUNC)", why


def _arrays(function: Function, module: Module, unit: Unit) -> Iterator[Noted]:
    for found in filter(None, map(_ALLOCA.match, function.body)):
        pointer, kind = found.groups()
        name, line = _variable(pointer, function, module)
        causes = dict.fromkeys(_causes(pointer, function, module, unit))
        why = "; ".join(causes) or "clang does not take it apart"
        yield line, f"'{name}', {kind}, stays in memory", why


def _variable(pointer: str, function: Function, module: Module) -> tuple[str, int]:
    """The name and line of what lies there, as the text declares it."""
    quoted = re.escape(pointer)
    declared = re.compile(
        rf"#dbg_declare\(ptr {quoted}, (!\d+)|#dbg_assign\(.*?, (!\d+), .*, ptr {quoted},"
    )
    for found in filter(None, map(declared.search, function.body)):
        number = found[1] or found[2]
        return module.names[number], module.lines[number]
    name = pointer[1:].split(".")[0]
    uses = (line for line in function.body if re.search(rf"{quoted}[,)\s]", line))
    at = next((line for use in uses if (line := _line(use, module))), function.line)
    return name, at


def _causes(pointer: str, function: Function, module: Module, unit: Unit) -> Iterator[str]:
    """What keeps an array in memory: variable indices, choices between elements, calls."""
    inside = {pointer}
    for line in function.body:
        text = without_debug(line)
        defined, _, operation = text.strip().partition(" = ")
        if not inside & set(VALUE.findall(operation or text)) or "#dbg" in text:
            continue
        number = _line(line, module)
        at = unit.place(number) if number else "what clang adds"
        if operation.startswith("getelementptr"):
            inside.add(defined)
            if len(VALUE.findall(operation)) > 1:
                yield f"{at} has an index known only at run time"
        elif operation.startswith(("select", "phi")):
            inside.add(defined)
            yield f"{at} chooses between elements, not between their values"
        elif (called := _CALL.search(text)) and "lifetime" not in called[1]:
            helper = module.functions.get(called[1])
            hands = f"hands it to {helper.plain_name}" if helper else "copies or fills it whole"
            yield f"{at} {hands}"


def _components(function: Function, module: Module) -> Iterator[Noted]:
    for line in function.body:
        if _COMPONENT.search(without_debug(line)):
            why = "which component is known only at run time"
            yield _line(line, module), "a component of a vector", why


def _registers(name: str, unit: Unit, optimized: Module, threads: int) -> Iterator[Remark]:
    most = min(REGISTERS // threads, MOST_REGISTERS)
    for function in optimized.functions.values():
        if _is_kernel(function, unit) and (needed := registers(function.body)) > most:
            what = f"about {needed} registers a thread, an estimate"
            why = f"a threadgroup of {threads} threads leaves {most} on an M1 or M2"
            where = "whole kernel" if len(unit.kernels) == 1 else f"whole {function.name}"
            yield Remark(name, where, what, why)


def _is_kernel(function: Function, unit: Unit) -> bool:
    return function.plain_name in unit.kernels


def _line(text: str, module: Module) -> int:
    found = _DEBUG.search(text)
    return module.lines.get(found[1], 0) if found else 0
