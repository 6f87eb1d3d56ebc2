"""Runs a compiled kernel on arrays in one schedule, through the C interface of the runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .compiler import runtime_library

# What a launch is counted by, in the order of runtime/counts.h.
COUNTS = (
    "matrix_products",
    "simd_reductions",
    "shuffles",
    "simdgroup_barriers",
    "matrix_transfers",
    "threadgroup_barriers",
    "device_bytes_read",
    "device_bytes_written",
    "threadgroup_bytes_read",
    "threadgroup_bytes_written",
    "float_operations",
    "integer_operations",
    "special_functions",
    "slow_integers",
)
INPUT, OUTPUT, FILLED_OUTPUT = range(3)  # Use in runtime/memory.h
Size = tuple[int, int, int]


@dataclass
class Buffer:
    """One argument of a kernel: its name in the text, its bytes, and what may be done to them."""

    name: str
    data: np.ndarray  # uint8
    item: int  # bytes of an element
    use: int = INPUT
    shift: int = 0  # bytes from an aligned address to the first


class FoundStruct(ctypes.Structure):
    """Finding of runtime/finding.h."""

    _fields_ = [
        ("found", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
        ("region", ctypes.c_uint32),
        ("between", ctypes.c_uint32),
        ("offset", ctypes.c_int64),
        ("size", ctypes.c_uint32),
        ("line", ctypes.c_uint32),
        ("other_line", ctypes.c_uint32),
        ("thread", ctypes.c_uint32),
        ("group", ctypes.c_uint32 * 3),
    ]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("granule", ctypes.c_uint32),
        ("use", ctypes.c_uint32),
        ("shift", ctypes.c_uint32),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("schedule", ctypes.c_uint64),
    ]


def launch(
    library: Path, buffers: Sequence[Buffer], grid: Size, threadgroup: Size, schedule: int
) -> tuple[FoundStruct, dict[str, int]]:
    """Run the kernel; outputs are written in place. What was found, and what was counted."""
    passed = (_Buffer * len(buffers))(
        *(_Buffer(b.data.ctypes.data, b.data.nbytes, b.item, b.use, b.shift) for b in buffers)
    )
    request = _Launch(
        _entry(library),
        passed,
        len(buffers),
        (ctypes.c_uint32 * 3)(*grid),
        (ctypes.c_uint32 * 3)(*threadgroup),
        schedule,
    )
    found = FoundStruct()
    counts = (ctypes.c_uint64 * len(COUNTS))()
    _runtime()(ctypes.byref(request), ctypes.byref(found), counts)
    return found, dict(zip(COUNTS, counts, strict=True))


@cache
def _runtime() -> Callable[..., None]:
    # Global, since the libraries of the kernels call it.
    run = ctypes.CDLL(str(runtime_library()), mode=ctypes.RTLD_GLOBAL).emu_launch
    run.restype = None
    return run


@cache
def _entry(library: Path) -> int:
    _runtime()
    function = ctypes.CDLL(str(library)).emu_entry
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address
    return address
