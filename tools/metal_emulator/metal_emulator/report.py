"""The words of a finding: kernel, line of its file, buffer and element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from . import findings
from .launch import Buffer, FoundStruct
from .msl import MetalText

FIRST_ARRAY = 32  # the first slot of threadgroup arrays: BUFFERS in runtime/memory.h
IN_MEMORY = {
    findings.OutOfBoundsDevice,
    findings.OutOfBoundsThreadgroup,
    findings.WriteToInput,
    findings.UninitialisedRead,
    findings.UnwrittenOutput,
    findings.Race,
    findings.ThreadgroupMemory,
    findings.Misaligned,
}
BETWEEN = (
    "",
    "lanes of one simdgroup that no simdgroup_barrier for this memory orders",
    "threads of one threadgroup that no threadgroup_barrier for this memory orders",
    "two threadgroups, which nothing orders",
)


def raise_finding(
    kernel: str,
    found: FoundStruct,
    metal: MetalText,
    buffers: Sequence[Buffer],
    arrays: Sequence[str],
) -> NoReturn:
    kind = findings.KINDS[found.kind]
    buffer, element = _element(found, buffers, arrays)
    message = _told(kind, found, metal, element)
    line = found.line - metal.body_line + 1
    if found.line:
        message = f"{place(found.line, metal)}: {message}"
        message += f" (thread {found.thread} of threadgroup {tuple(found.group)})"
    raise kind(message, kernel, line if line > 0 else None, buffer if kind in IN_MEMORY else None)


def place(line: int, metal: MetalText) -> str:
    """A line of the generated text as its author knows it."""
    if line >= metal.body_line:
        return f"line {line - metal.body_line + 1}"
    return f"header line {line}"


def _element(
    found: FoundStruct, buffers: Sequence[Buffer], arrays: Sequence[str]
) -> tuple[str | None, str]:
    """The name of the memory, and the words for the place in it."""
    if found.region >= FIRST_ARRAY:
        index = found.region - FIRST_ARRAY
        if index < len(arrays):
            return arrays[index], f"byte {found.offset} of {arrays[index]}"
    elif found.region < len(buffers):
        buffer = buffers[found.region]
        size = buffer.data.nbytes // buffer.item
        return buffer.name, f"{buffer.name}[{found.offset // buffer.item}] of {size}"
    return None, "memory that belongs to no buffer"


def _told(kind: type[findings.Finding], found: FoundStruct, metal: MetalText, element: str) -> str:
    other = f" and {place(found.other_line, metal)}" if found.other_line else ""
    elsewhere = other or " and others have returned"
    messages = {
        findings.OutOfBoundsDevice: f"access of {found.size} bytes at {element}",
        findings.OutOfBoundsThreadgroup: f"access of {found.size} bytes at {element}",
        findings.OutOfBoundsThread: f"index {found.offset} of an array of the thread's own",
        findings.Misaligned: f"access of {found.size} bytes at {element} is not aligned",
        findings.WriteToInput: f"write to the input {element}",
        findings.UninitialisedRead: f"read of {element}, which nothing has written",
        findings.UnwrittenOutput: f"nothing writes {element}",
        findings.Race: f"{element}, here{other}: race between {BETWEEN[found.between]}",
        findings.BarrierDivergence: f"some threads wait at this barrier{elsewhere}",
        findings.SimdDivergence: f"some lanes wait here{elsewhere}",
        findings.InactiveLane: f"shuffle from lane {found.offset}, which does not exist",
        findings.Endless: "a thread goes on for ever without meeting another",
        findings.ThreadgroupMemory: f"{found.offset} bytes of threadgroup memory, more than 32768",
    }
    return messages[kind]
