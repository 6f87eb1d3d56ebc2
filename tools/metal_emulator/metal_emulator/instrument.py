"""LLVM text -> LLVM text: accesses that know their line, and counts of arithmetic.

clang's thread sanitizer puts a call before every load and store that others could see. Each becomes
a call of the emulator's runtime that also passes the size, the alignment and the line of the text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

_ACCESS = re.compile(
    r"(?:tail )?call void @__tsan_(?:unaligned_|volatile_|unaligned_volatile_)?"
    r"(read|write)(\d+)\(ptr ([^,]*?)\)(.*)"
)
_BLOCK_ACCESS = re.compile(r"call ptr @__tsan_(memcpy|memmove|memset)\((.*)\), !dbg (!\d+)")
_DROPPED = re.compile(r"call void @__tsan_(init|func_entry|func_exit)\(")
_ALIGNMENT = re.compile(r"^  .*\b(?:load|store) .*, align (\d+)")
_DEBUG = re.compile(r"!dbg (!\d+)")
_LOCATION = re.compile(r"^(!\d+) = (?:distinct )?!DILocation\(line: (\d+)", re.MULTILINE)
_TERMINATOR = re.compile(r"^  (br|ret|switch|unreachable)\b")
_BLOCK_CALLS = {"memcpy": "emu_copy", "memmove": "emu_copy", "memset": "emu_fill"}

_DECLARATIONS = """
declare void @emu_read(ptr, i64, i32, i64)
declare void @emu_write(ptr, i64, i32, i64)
declare ptr @emu_copy(ptr, ptr, i64, i32)
declare ptr @emu_fill(ptr, i32, i64, i32)
@counts = external global [0 x i64]
"""

# Where a kind of arithmetic is counted: Count in runtime/counts.h.
FLOAT, INTEGER, SPECIAL, SLOW = 10, 11, 12, 13
_ARITHMETIC = {
    FLOAT: r"fadd|fsub|fmul|fneg|fcmp|fptrunc|fpext",
    INTEGER: r"add|sub|and|or|xor|icmp|udiv|sdiv|urem|srem|select",
    SPECIAL: r"fdiv|frem",
    SLOW: r"shl|lshr|ashr|mul|sitofp|uitofp|fptosi|fptoui",
}
# A half is an operand, and a result, as it is: Apple's registers of 16 bits need no conversion.
_FREE = re.compile(r"= fpext (?:<\d+ x )?half|= fptrunc .* to (?:<\d+ x )?half")
_INSTRUCTION = re.compile(
    r"^  %\S+ = (?:"
    + "|".join(f"(?P<k{kind}>{names})" for kind, names in _ARITHMETIC.items())
    + r")\b(?: (?:nuw|nsw|exact|disjoint|nneg|samesign|o?[a-z]{2,3}))* (?P<type><(\d+) x )?"
)
_CALLED = re.compile(r"call .*@(?:llvm\.(\w+)|(\w+f)\()")
_FUSED = {"fma", "fmuladd", "fabs", "minnum", "maxnum", "floor", "ceil", "trunc", "rint"}
_SPECIAL_CALLS = {"sqrt"} | {
    name + "f"
    for name in "exp exp2 log log2 log10 log1p expm1 sin cos tan tanh sinh cosh pow fmod".split()
}


def instrument(text: str) -> str:
    lines_of = dict(_LOCATION.findall(text))
    return "\n".join(_rewritten(text, lines_of)) + _DECLARATIONS


def _rewritten(text: str, lines_of: dict[str, str]) -> Iterator[str]:
    counted: Counter[int] = Counter()
    serial = 0
    lines = text.split("\n")
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if _DROPPED.search(line) or line.startswith("declare void @__tsan_"):
            continue
        if "@__tsan_" in line:
            yield _with_line(line, following, lines_of)
            continue
        _count(line, counted)
        if _TERMINATOR.match(line):
            for kind, amount in counted.items():
                yield from _add(kind, amount, serial)
                serial += 1
            counted.clear()
        yield line


def _with_line(line: str, following: str, lines_of: dict[str, str]) -> str:
    """The call that stands before an access, for the runtime; the access itself follows."""
    debug = _DEBUG.search(line)
    at = lines_of[debug[1]] if debug else "0"
    if found := _ACCESS.search(line):
        kind, size, pointer, rest = found.groups()
        aligned = _ALIGNMENT.search(following)
        assert aligned, f"no access follows {line!r}"
        arguments = f"ptr {pointer}, i64 {size}, i32 {at}, i64 {aligned[1]}"
        return f"  call void @emu_{kind}({arguments}){rest}"
    if found := _BLOCK_ACCESS.search(line):
        name, arguments, _ = found.groups()
        call = f"call ptr @{_BLOCK_CALLS[name]}({arguments}, i32 {at})"
        return line.replace(found[0], f"{call}, !dbg {found[3]}")
    return line


def _count(line: str, counted: Counter[int]) -> None:
    if _FREE.search(line):
        return
    if found := _INSTRUCTION.match(line):
        kind = next(k for k in _ARITHMETIC if found[f"k{k}"])
        counted[kind] += int(found[found.re.groups] or 1)
    elif found := _CALLED.search(line):
        if found[1] in _FUSED:
            counted[FLOAT] += 1
        elif (found[1] or found[2]) in _SPECIAL_CALLS:
            counted[SPECIAL] += 1


def _add(kind: int, amount: int, serial: int) -> Iterator[str]:
    """counts[kind] += amount, without a call."""
    place = f"getelementptr ([0 x i64], ptr @counts, i64 0, i64 {kind})"
    yield f"  %emu.old.{serial} = load i64, ptr {place}"
    yield f"  %emu.new.{serial} = add i64 %emu.old.{serial}, {amount}"
    yield f"  store i64 %emu.new.{serial}, ptr {place}"
