"""A stand-in for `mx.fast.metal_kernel` that runs the text which MLX makes, and checks it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from . import findings
from .arrays import as_array, contiguous, filled, from_bytes, memory, to_numpy
from .compiler import kernel_library
from .launch import FILLED_OUTPUT, OUTPUT, Buffer, Size, launch
from .msl import Input, MetalText, metal_text
from .report import raise_finding
from .translate import Translation, translate

SCHEDULES = (0, 1, 5)  # natural order, reversed, shuffled


@dataclass
class EmulatedKernel:
    """A kernel with the arguments of `mx.fast.metal_kernel`, and with the call of what it returns.

    A call raises a `Finding` for the first fault, and a `CompileError` for what clang refuses.

    Args:
        schedules: orders in which threads run: 0 is natural, 1 reversed, others are seeds of a
            shuffle. All must give the same bits; one is faster than three.
        slices: inputs start one element after an aligned address, as slices of arrays may.

    `counts` is what the last launch did, by the names of `COUNTS`: lane by lane for accesses and
    arithmetic, once per simdgroup for what its lanes do together.
    """

    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False
    compile_options: Any = None  # the arithmetic here is that of the mode "safe" whatever they say
    schedules: Sequence[int] = SCHEDULES
    slices: bool = False
    counts: dict[str, int] = field(default_factory=dict)

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        grid: Size,
        threadgroup: Size,
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, Any]] = (),
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        arrays = [as_array(x) for x in inputs]
        mx.eval(arrays)
        metal = self._text(arrays, output_dtypes, template)
        if verbose:
            print(metal.text)
        _check_size(self.name, grid, threadgroup)
        shapes = [tuple(shape) for shape in output_shapes]
        given = self._inputs(arrays, metal)
        results = []
        for schedule in self.schedules:
            outputs = self._outputs(shapes, output_dtypes, init_value)
            self._run(metal, [*given, *outputs], grid, threadgroup, schedule)
            results.append(outputs)
        self._compare(results)
        return [
            from_bytes(buffer.data, shape, dtype)
            for buffer, shape, dtype in zip(results[0], shapes, output_dtypes, strict=True)
        ]

    def _text(
        self, arrays: Sequence[mx.array], dtypes: Sequence[mx.Dtype], template: Sequence[Any]
    ) -> MetalText:
        return metal_text(
            self.name,
            [Input.of(name, x) for name, x in zip(self.input_names, arrays, strict=True)],
            list(zip(self.output_names, dtypes, strict=True)),
            self.source,
            self.header,
            template,
            self.atomic_outputs,
        )

    def _inputs(self, arrays: Sequence[mx.array], metal: MetalText) -> list[Buffer]:
        """A buffer for each input and, where the text asks, its shape, strides and ndim."""
        asked = {parameter.name for parameter in metal.parameters}
        buffers = []
        for name, x in zip(self.input_names, arrays, strict=True):
            data = to_numpy(x)
            data = contiguous(data) if self.ensure_row_contiguous else data
            strides = [s // data.itemsize for s in data.strides]
            shift = data.itemsize if self.slices else 0
            buffers.append(Buffer(name, memory(data), data.itemsize, shift=shift))
            for extra in (
                Buffer(f"{name}_shape", _bytes(data.shape, np.int32), 4),
                Buffer(f"{name}_strides", _bytes(strides, np.int64), 8),
                Buffer(f"{name}_ndim", _bytes([data.ndim], np.int32), 4),
            ):
                if extra.name in asked:
                    buffers.append(extra)
        return buffers

    def _outputs(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[mx.Dtype],
        init_value: float | None,
    ) -> list[Buffer]:
        buffers = []
        for name, shape, dtype in zip(self.output_names, shapes, dtypes, strict=True):
            if init_value is None:
                data = np.full(int(np.prod(shape)) * dtype.size, 0xFF, np.uint8)
                buffers.append(Buffer(name, data, dtype.size, OUTPUT))
            else:
                data = filled(shape, dtype, init_value)
                buffers.append(Buffer(name, data, dtype.size, FILLED_OUTPUT))
        return buffers

    def _run(
        self,
        metal: MetalText,
        buffers: Sequence[Buffer],
        grid: Size,
        threadgroup: Size,
        schedule: int,
    ) -> None:
        translation = _translated(metal)
        library = kernel_library(translation.text)
        found, self.counts = launch(library, buffers, grid, threadgroup, schedule)
        if found.found:
            raise_finding(self.name, found, metal, buffers, translation.arrays)

    def _compare(self, results: Sequence[Sequence[Buffer]]) -> None:
        for schedule, outputs in zip(self.schedules, results, strict=True):
            for first, other in zip(results[0], outputs, strict=True):
                differ = np.flatnonzero(first.data != other.data)
                if differ.size:
                    raise findings.ScheduleDependent(
                        f"{first.name}[{differ[0] // first.item}] is another value in schedule "
                        f"{schedule} than in schedule {self.schedules[0]}",
                        self.name,
                        buffer=first.name,
                    )


metal_kernel = EmulatedKernel


@cache
def _translated(metal: MetalText) -> Translation:
    return translate(metal)


def _bytes(values: Sequence[int], kind: type) -> np.ndarray:
    return np.array(values, kind).view(np.uint8)


def _check_size(name: str, grid: Size, threadgroup: Size) -> None:
    if min(grid) < 1:
        raise findings.ThreadgroupSize(f"no threads in a grid of {grid}", name)
    threads = int(np.prod(threadgroup))
    if not 0 < threads <= 1024:
        raise findings.ThreadgroupSize(
            f"a threadgroup must have 1 to 1024 threads but {threadgroup} has {threads}", name
        )
