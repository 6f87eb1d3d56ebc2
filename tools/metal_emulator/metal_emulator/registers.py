"""An estimate of the registers that a thread of a kernel needs, from its LLVM text.

It is the largest number of 32-bit values that are alive at one place: SSA values from where they
are computed to their last use, in the order in which the optimizer left the instructions. Nothing
counts for parameters and threadgroup arrays, which all threads share, for constants and for truth
values; 16 bits are half a value. What is another's bits, converted between integers or with a
constant added to an address, is that other one. An address is an offset from what threads share,
of 32 bits; so is all that clang holds in 64.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from .optimized import VALUE, without_debug

_DEFINED = re.compile(r"^  (%[\w.$-]+) = (?:(?:tail|musttail|notail) )?(\w+) (.*)$")
_LABEL = re.compile(r"^([\w.$-]+):")
_TARGET = re.compile(r"label %([\w.$-]+)")
_FROM = re.compile(r"\[ ([^\[\]]+), %([\w.$-]+) \]")
_TYPE = re.compile(r"<(\d+) x (\w+)>|\b(ptr|i\d+|half|bfloat|float|double)\b")
_SAME_BITS = {"zext", "sext", "trunc", "bitcast", "inttoptr", "ptrtoint", "freeze"}
_HALVES = {"i1": 0, "i8": 1, "i16": 1, "half": 1, "bfloat": 1}
_WHOLE = 2  # halves of a register


@dataclass
class _Block:
    successors: set[str] = field(default_factory=set)
    # Of each instruction: the bit of what it defines, and those of what it uses.
    steps: list[tuple[int, int]] = field(default_factory=list)
    passed: dict[str, int] = field(default_factory=dict)  # to phis, by where the edge ends


class _Numbers:
    """A bit for each value of a function, and its size in halves of a register."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {}
        self.halves: list[int] = []
        self.own: set[str] = set()  # those that are not another's bits

    def add(self, name: str, halves: int) -> None:
        self.own.add(name)
        self.index[name] = len(self.halves)
        self.halves.append(halves)

    def bits(self, names: Sequence[str]) -> int:
        return sum({1 << self.index[name] for name in names if name in self.index})

    def size(self, bits: int) -> int:
        total = 0
        while bits:
            lowest = bits & -bits
            total += self.halves[lowest.bit_length() - 1]
            bits ^= lowest
        return total


def registers(body: Sequence[str]) -> int:
    """How many registers of 32 bits the function of these lines needs at least, by the estimate."""
    numbers = _numbered(body)
    blocks = _blocks(body, numbers)
    entering = _alive(blocks)
    most = 0
    for block in blocks.values():
        alive = _leaving(block, entering)
        size = numbers.size(alive)
        most = max(most, size)
        for defined, used in reversed(block.steps):
            size += numbers.size(used & ~alive) - numbers.size(defined & alive & ~used)
            alive = alive & ~defined | used
            most = max(most, size)
    return -(-most // 2)


def _numbered(body: Sequence[str]) -> _Numbers:
    numbers = _Numbers()
    for found in filter(None, map(_DEFINED.match, body)):
        name, operation, rest = found.groups()
        operands = [x for x in VALUE.findall(without_debug(rest)) if x in numbers.index]
        renames = operation in _SAME_BITS or operation == "getelementptr" and len(operands) < 2
        if renames and operands:
            numbers.index[name] = numbers.index[operands[0]]
        elif not renames and operation != "alloca" and "@emu_storage" not in rest:
            numbers.add(name, _halves(operation, rest))
    return numbers


def _halves(operation: str, rest: str) -> int:
    if operation in {"icmp", "fcmp"}:
        return 0
    if operation == "getelementptr":
        return _WHOLE
    text = without_debug(rest)
    _, converted, to = text.rpartition(" to ")
    types = _TYPE.findall(to if converted and operation != "call" else text)
    if operation == "select":
        types = types[1:]  # behind the condition
    count, element, plain = types[0] if types else ("", "", "float")
    if operation == "extractelement":
        count = ""
    return int(count or 1) * _HALVES.get(element or plain, _WHOLE)


def _blocks(body: Sequence[str], numbers: _Numbers) -> dict[str, _Block]:
    label = ""
    blocks = {label: _Block()}
    phis: list[tuple[str, str, str]] = []  # from, to, value
    for line in body:
        if started := _LABEL.match(line):
            label = started[1]
            blocks[label] = _Block()
        elif not line.lstrip().startswith("#dbg"):
            text = without_debug(line)
            blocks[label].successors |= set(_TARGET.findall(text))
            defined = _DEFINED.match(text)
            is_phi = defined is not None and defined[2] == "phi"
            if is_phi:
                phis += [(start, label, value) for value, start in _FROM.findall(text)]
            name = defined[1] if defined else ""
            own = numbers.bits([name]) if name in numbers.own else 0
            used = 0 if is_phi else numbers.bits(VALUE.findall(text)) & ~own
            blocks[label].steps.append((own, used))
    for start, end, value in phis:
        passed = blocks.get(start, blocks[""]).passed
        passed[end] = passed.get(end, 0) | numbers.bits([value])
    return blocks


def _alive(blocks: dict[str, _Block]) -> dict[str, int]:
    """The values that are alive where each block starts."""
    entering = dict.fromkeys(blocks, 0)
    changed = True
    while changed:
        changed = False
        for label, block in reversed(blocks.items()):
            alive = _leaving(block, entering)
            for defined, used in reversed(block.steps):
                alive = alive & ~defined | used
            if alive != entering[label]:
                entering[label], changed = alive, True
    return entering


def _leaving(block: _Block, entering: dict[str, int]) -> int:
    alive = 0
    for label in block.successors:
        alive |= entering.get(label, 0) | block.passed.get(label, 0)
    return alive
