"""What the emulator finds in a kernel: one exception per kind, naming kernel, line and buffer."""

from __future__ import annotations


class Finding(Exception):
    """A fault of a kernel, whether or not it shows in the results.

    `line` counts from the first of the kernel's body; None where the fault has no line, or one of
    the header.
    """

    def __init__(
        self, message: str, kernel: str, line: int | None = None, buffer: str | None = None
    ) -> None:
        super().__init__(f"{kernel}: {message}")
        self.kernel = kernel
        self.line = line
        self.buffer = buffer


class OutOfBoundsDevice(Finding):
    """An access outside an input or output."""


class OutOfBoundsThreadgroup(Finding):
    """An access outside a threadgroup array."""


class OutOfBoundsThread(Finding):
    """An index outside an array of the thread's own."""


class Misaligned(Finding):
    """An access of a vector at an address that its type does not allow."""


class WriteToInput(Finding):
    """A write to a buffer that others hold."""


class UninitialisedRead(Finding):
    """A read of an output or of threadgroup memory that nothing has written."""


class UnwrittenOutput(Finding):
    """Elements of an output that nothing wrote."""


class Race(Finding):
    """Two accesses, one of them a write, that no barrier for that memory orders."""


class BarrierDivergence(Finding):
    """A threadgroup barrier that only some threads reach."""


class SimdDivergence(Finding):
    """A simdgroup operation that only some lanes reach, or that lanes reach at different places."""


class InactiveLane(Finding):
    """A shuffle from a lane that does not exist."""


class Endless(Finding):
    """A loop that never ends, or only when another thread runs: Metal promises nobody a turn."""


class ThreadgroupMemory(Finding):
    """More than 32 KB of threadgroup memory."""


class ThreadgroupSize(Finding):
    """More than 1024 threads in a threadgroup, or none, or a grid of none."""


class ScheduleDependent(Finding):
    """Other results when threads run in another order."""


# By the numbers of runtime/finding.h.
KINDS: tuple[type[Finding], ...] = (
    OutOfBoundsDevice,
    OutOfBoundsThreadgroup,
    WriteToInput,
    UninitialisedRead,
    UnwrittenOutput,
    Race,
    BarrierDivergence,
    SimdDivergence,
    InactiveLane,
    ThreadgroupMemory,
    Misaligned,
    Endless,
    OutOfBoundsThread,
)
