"""A Metal kernel as text, and the backend that runs it here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, Protocol

import mlx.core as mx

from mlx_kimi.metal_kernels.source import body_of, headers_of, without_comments


class Launch(Protocol):
    """What `mx.fast.metal_kernel` returns, and every other backend with it."""

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        template: Sequence[tuple[str, Any]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]: ...


@dataclass(frozen=True)
class Kernel:
    """One kernel. `<name>.metal` is its body, without the signature that `mx.fast` generates.

    Inputs of under 8 elements come in another address space, so the body never names the space of
    an input. Its first lines name the headers it uses: `#include "tiles.h"`.

    Indices are 32 bits wide. In the arrays named by `wide` the body starts from an offset of 64
    bits, and only what it adds to that is narrow: they may have any size, all others not.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    wide: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The body; the lines that include headers are empty, so that all keep their numbers."""
        return body_of(f"{self.name}.metal")

    @property
    def header(self) -> str:
        """The text of all headers that the body includes."""
        return self.header_with({})

    def header_with(self, instead: Mapping[str, str]) -> str:
        """The same with other files in place of some: {"tiles.h": "cuda_tiles.h"}."""
        return headers_of(f"{self.name}.metal", instead)

    def __call__(self, **launch: Any) -> list[mx.array]:
        """Run it on the backend of this moment; arguments as of `Launch`.

        Raises:
            ValueError: an array that is not `wide` has 2^31 elements or more.
        """
        build = backend()
        if build is None:
            raise RuntimeError(f"[{self.name}] no backend runs kernels here; use the ops form.")
        self._check_sizes(launch["inputs"], launch["output_shapes"])
        return build(self)(**launch)

    def _check_sizes(self, inputs: Sequence[Any], output_shapes: Sequence[Sequence[int]]) -> None:
        sizes = [x.size if isinstance(x, mx.array) else 1 for x in inputs]
        sizes += [prod(shape) for shape in output_shapes]
        if max(sizes) < NARROW_SIZE:  # (launches are many, and nearly all end here)
            return
        for name, size in zip((*self.inputs, *self.outputs), sizes, strict=True):
            if size >= NARROW_SIZE and name not in self.wide:
                raise ValueError(
                    f"[{self.name}] {name} must have fewer than {NARROW_SIZE} elements but has "
                    f"{size}."
                )


Backend = Callable[[Kernel], Launch]
# What `use_backend` chose, and whether its launches can be traced; None: the GPU's own backend.
_CHOSEN: ContextVar[tuple[Backend | None, bool] | None] = ContextVar("kernel backend", default=None)
_REFUSED: dict[str, str] = {}  # kernels that cannot run on this GPU, and the message: by `trying`
_OFF: ContextVar[Mapping[str, str]] = ContextVar("kernels off", default={})  # noqa: B039
# In what MLX says where memory is short.
NO_MEMORY = ("Insufficient Memory", "OutOfMemory", "out of memory", "Unable to allocate")
CPU = mx.Device(mx.cpu)
NO_BACKEND = "nothing runs kernels here"  # why an operator uses its ops form
NARROW_SIZE = 1 << 31  # elements that an index of 32 bits does not reach
OFF = "MLX_KIMI_NO_KERNELS"  # set in the environment, every operator uses its ops form


def backend() -> Backend | None:
    """What runs kernels at this moment; None: nothing, and operators use their ops form."""
    chosen = _CHOSEN.get()
    if chosen is not None:
        return chosen[0]
    if mx.default_device() == CPU or os.environ.get(OFF):
        return None
    if mx.cuda.is_available():
        from mlx_kimi.metal_kernels.cuda import cuda  # here: on other machines it is never needed

        return cuda
    return _metal if mx.metal.is_available() else None


def not_running(*kernels: Kernel) -> str | None:
    """Why an operator that needs these kernels uses its ops form; None: all of them run here."""
    if backend() is None:
        return NO_BACKEND
    off = _OFF.get()
    for kernel in kernels:
        if kernel.name in _REFUSED:
            return _refusal(kernel.name)
        if kernel.name in off:
            return f"{kernel.name} is off: {off[kernel.name]}"
    return None


@contextmanager
def without(off: Mapping[str, str]) -> Iterator[None]:
    """Within, operators that need one of these kernels use their ops form; the values say why."""
    token = _OFF.set(off)
    try:
        yield
    finally:
        _OFF.reset(token)


def refused_kernels() -> Iterable[str]:
    """Those that `trying` refused."""
    return _REFUSED


def refusals() -> list[str]:
    """Of every kernel that `trying` refused, in one line each."""
    return [_refusal(name) for name in _REFUSED]


def _refusal(name: str) -> str:
    """Why, of a kernel that `trying` refused."""
    return f"{name} does not run on this GPU: {in_one_line(_REFUSED[name])}"


def in_one_line(message: str) -> str:
    """What MLX or a compiler says of a kernel that does not run: the first error."""
    found = re.search(r"\berror: .*", message)
    return " ".join((found[0] if found else message).split())[:200]


@contextmanager
def trying(
    refused: dict[str, str] | None = None,
    before: Callable[[str, tuple[Any, ...]], None] = lambda name, form: None,
    after: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, str]]:
    """Run each launch by itself. A kernel that cannot run answers zeros, and is refused afterwards.

    MLX compiles a kernel at its first launch: a text that this GPU's compiler does not take, or
    more threads than it has registers for, is found here and not in the middle of an answer. Yields
    the kernels refused so far, each with MLX's or the compiler's whole message. A kernel that takes
    the whole GPU with it is the last of these, and a RuntimeError is raised.

    Args:
        refused: takes them instead, and they are not refused afterwards.
        before: is told the kernel's name before each launch, and its form: the values of its
            template, its grid, its outputs' types and shapes. Its inputs are there then.
        after: is called once a launch has ended or thrown.
    """
    refused = _REFUSED if refused is None else refused
    build = backend()
    assert build is not None, "kernels run here"

    def attempt(kernel: Kernel) -> Launch:
        def launch(**how: Any) -> list[mx.array]:
            mx.eval([x for x in how["inputs"] if isinstance(x, mx.array)])
            sizes = (how["grid"], *map(tuple, how["output_shapes"]))
            before(kernel.name, (*how["template"], *how["output_dtypes"], *sizes))
            try:
                outputs = build(kernel)(**how)
                mx.eval(outputs)
            except (RuntimeError, ValueError) as error:
                if any(sign in str(error) for sign in NO_MEMORY):
                    raise  # which says nothing of the kernel
                refused[kernel.name] = str(error)
                mx.eval(mx.zeros(1) + 1)
                pairs = zip(how["output_shapes"], how["output_dtypes"], strict=True)
                outputs = [mx.zeros(shape, dtype) for shape, dtype in pairs]
            after()
            return outputs

        return launch

    with use_backend(attempt):
        yield refused


def is_traced() -> bool:
    """Whether kernels run here, and `mx.compile` may hold them in a graph: GPUs' own backends."""
    chosen = _CHOSEN.get()
    return backend() is not None and (chosen is None or chosen[1])


def takes_addresses() -> bool:
    """Whether kernels may read behind the views they are given: GPUs' own backends. An emulator
    knows the bounds of an array."""
    return backend() is not None and _CHOSEN.get() is None


@contextmanager
def use_backend(chosen: Backend | None, traced: bool = False) -> Iterator[None]:
    """Run kernels on `chosen`, such as the emulator of the tests; None: run none.

    `traced`: its launches may become part of a compiled graph; an emulator's may not.
    """
    token = _CHOSEN.set((chosen, traced))
    try:
        yield
    finally:
        _CHOSEN.reset(token)


@cache
def _metal(kernel: Kernel) -> Launch:
    build: Any = mx.fast.metal_kernel
    launch: Launch = build(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=without_comments(kernel.source),
        header=without_comments(kernel.header),
    )
    return launch
