"""Backends for `use_backend`: the kernels of mlx_kimi on the emulator, and past its lint."""

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import metal_emulator
from metal_emulator import EmulatedKernel, Remark

from mlx_kimi.metal_kernels.kernel import Kernel, Launch


def text(kernel: Kernel) -> tuple[Any, ...]:
    """The first arguments of `mx.fast.metal_kernel`, and of what stands in for it."""
    return kernel.name, kernel.inputs, kernel.outputs, kernel.source, kernel.header


@cache
def emulator(kernel: Kernel, **how: Any) -> EmulatedKernel:
    """`with use_backend(emulator)`; `emulator(kernel).counts` is what the last launch did."""
    return metal_emulator.metal_kernel(*text(kernel), **how)


def linter(
    large: Collection[str] = (), remarks: list[Remark] | None = None
) -> Callable[[Kernel], Launch]:
    """`with use_backend(linter())`: each call is linted and answers with zeros.

    `remarks` gets what may be slow in it.
    """
    return lambda kernel: metal_emulator.lint_kernel(*text(kernel), large=large, remarks=remarks)
