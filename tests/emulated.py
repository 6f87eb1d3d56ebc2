"""Backends for `use_backend`: the kernels of mlx_kimi on the emulator, and past its lint."""

import re
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import metal_emulator
import mlx.core as mx
from metal_emulator import EmulatedKernel, LintError, Remark

from mlx_kimi.metal_kernels.kernel import Kernel, Launch
from mlx_kimi.metal_kernels.source import places_of_headers


def text(kernel: Kernel) -> tuple[Any, ...]:
    """The first arguments of `mx.fast.metal_kernel`, and of what stands in for it."""
    return kernel.name, kernel.inputs, kernel.outputs, kernel.source, kernel.header


@cache
def emulator(kernel: Kernel, **how: Any) -> EmulatedKernel:
    """`with use_backend(emulator)`; `emulator(kernel).counts` is what the last launch did."""
    return metal_emulator.metal_kernel(*text(kernel), **how)


def linter(
    large: Collection[str] = (), remarks: list[str] | None = None
) -> Callable[[Kernel], Launch]:
    """`with use_backend(linter())`: each call is linted and answers with zeros.

    `remarks` gets what may be slow in it. All that is found is named by file and line.
    """

    def build(kernel: Kernel) -> Launch:
        found: list[Remark] = []
        lint = metal_emulator.lint_kernel(*text(kernel), large=large, remarks=found)

        def launch(**how: Any) -> list[mx.array]:
            try:
                return lint(**how)
            except LintError as error:
                raise LintError(by_file(kernel, str(error))) from None
            finally:
                if remarks is not None:
                    remarks.extend(by_file(kernel, str(remark)) for remark in found)

        return launch

    return build


def by_file(kernel: Kernel, message: str) -> str:
    """The message with `tiles.h:12` for each line of the joined headers, and of the body."""
    places = places_of_headers(f"{kernel.name}.metal")
    message = re.sub(r"\bheader line (\d+)", lambda found: places[int(found[1]) - 1], message)
    return re.sub(r"\bline (\d+)", rf"{kernel.name}.metal:\1", message)
