"""Kernels on NVIDIA GPUs: the Metal text behind a header that gives CUDA Metal's language.

The whole function that MLX generates for Metal goes into the header of a CUDA kernel, whose body is
one call of it: templates, scalars and thread positions then mean what they mean in Metal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from hashlib import sha256
from math import prod
from typing import Any

import mlx.core as mx

from mlx_kimi.metal_kernels.kernel import Kernel, Launch, text_of
from mlx_kimi.metal_kernels.msl import Input, MetalText, metal_text

# `threadgroup T x[N];` declares storage; a pointer has its `*` between T and x.
_STORAGE = re.compile(r"\bthreadgroup\s+(?=[A-Za-z_][\w:]*(?:<[^;{}()]*?>)?\s+\w+\s*[\[;,])")
_BUFFER = re.compile(r"\*(?= \w+ \[\[buffer)")
_ATTRIBUTE = re.compile(r"\[\[[^\]]*\]\]")
_INSTANCE = re.compile(r"^template \[\[host_name.*$", re.MULTILINE)
# MLX hashes the whole text at every launch: what only people read would cost it a microsecond.
_FOR_PEOPLE = re.compile(r"[ \t]*//[^\n]*|^[ \t]+|(?<=\n)\n+", re.MULTILINE)
_INSTEAD = {"tiles.h": "cuda_tiles.h"}  # the same functions for another layout of tiles
_MACROS = ("device", "constant", "thread", "threadgroup")


@dataclass
class CudaKernel:
    """A kernel with the call of what `mx.fast.metal_kernel` returns, for NVIDIA GPUs.

    The grid is a multiple of the threadgroup, and the text asks for no shapes or strides.
    """

    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    source: str
    header: str = ""
    _built: dict[Any, Launch] = field(default_factory=dict)

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, Any]] = (),
        **rest: Any,
    ) -> list[mx.array]:
        if any(size % group for size, group in zip(grid, threadgroup, strict=True)):
            raise ValueError(
                f"[{self.name}] the grid must be a multiple of the threadgroup on NVIDIA GPUs but "
                f"{grid} is not of {threadgroup}."
            )
        arrays = [x if isinstance(x, mx.array) else _scalar(x) for x in inputs]
        types = tuple((x.dtype, x.ndim > 0) for x in arrays)
        threads = prod(threadgroup)
        key = types, tuple(output_dtypes), tuple(template), threads
        if key not in self._built:
            self._built[key] = self._build(self.text(arrays, output_dtypes, template, threads))
        outputs: list[mx.array] = self._built[key](
            inputs=arrays,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            **rest,
        )
        return outputs

    def text(
        self,
        inputs: Sequence[mx.array],
        dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, Any]] = (),
        threads: int = 1024,
    ) -> CudaText:
        """The CUDA text for inputs and outputs of these types."""
        return cuda_text(
            metal_text(
                self.name,
                [Input.of(name, x) for name, x in zip(self.input_names, inputs, strict=True)],
                list(zip(self.output_names, dtypes, strict=True)),
                self.source,
                self.header,
                template,
            ),
            threads,
        )

    def _build(self, text: CudaText) -> Launch:
        # MLX finds a compiled kernel by its name alone, also one of an earlier run, on disk.
        version = sha256((text.header + text.body).encode()).hexdigest()[:16]
        build: Any = mx.fast.cuda_kernel
        launch: Launch = build(
            name=f"{self.name}_{version}",
            input_names=list(self.input_names),
            output_names=list(self.output_names),
            source=text.body,
            header=text.header,
        )
        return launch


metal_kernel = CudaKernel  # for anyone's kernels


@lru_cache(maxsize=1024, typed=True)
def _scalar(x: bool | int | float) -> mx.array:
    return mx.array(x)


@cache
def cuda(kernel: Kernel) -> CudaKernel:
    """The backend of NVIDIA GPUs."""
    header = kernel.header_with(_INSTEAD)
    return CudaKernel(kernel.name, kernel.inputs, kernel.outputs, kernel.source, header)


@dataclass(frozen=True)
class CudaText:
    """What `mx.fast.cuda_kernel` takes."""

    header: str
    body: str


def cuda_text(metal: MetalText, threads: int) -> CudaText:
    """The same kernel for CUDA, for threadgroups of so many threads.

    Raises:
        ValueError: the text asks for an array's shape, strides or number of dimensions.
    """
    text = _INSTANCE.sub("", metal.text)
    text = _STORAGE.sub("__shared__ ", text)
    # Outputs are arrays of their own, so that no store stands between two loads.
    text = _BUFFER.sub("* __restrict__", text)
    text = _ATTRIBUTE.sub("", text)
    buffers = [p.name for p in metal.parameters if not p.attribute]
    places = {p.name for p in metal.parameters if p.name.endswith(("_shape", "_strides", "_ndim"))}
    if places:
        raise ValueError(f"no {', '.join(sorted(places))} on NVIDIA GPUs")
    parameters = ", ".join(f"const void* {name}" for name in buffers)
    header = "\n".join(
        [
            text_of("cuda.h"),
            "namespace msl {",
            text,
            f"inline void entry({parameters}) {{ {_call(metal)}; }}",
            "}  // namespace msl",
            *(f"#undef {name}" for name in _MACROS),
            # This says that one threadgroup fills a processor, so a thread has registers to load
            # ahead: the scan of kda_chunk takes half the time. The signature is MLX's to write.
            "#undef __global__",
            f"#define __global__ __attribute__((global)) __launch_bounds__({threads}, 1)",
            "",
        ]
    )
    return CudaText(_FOR_PEOPLE.sub("", header), f"  msl::entry({', '.join(buffers)});")


def _call(metal: MetalText) -> str:
    """The kernel, called with buffers as Metal declares them and with its thread's place."""
    arguments = []
    for parameter in metal.parameters:
        name, kind = parameter.name, parameter.declaration.removesuffix(parameter.name).strip()
        if parameter.attribute:
            arguments.append(f"metal::place::{name}()")
        elif kind.endswith("&"):
            arguments.append(f"*({kind[:-1]}*){name}")
        else:
            arguments.append(f"({kind}){name}")
    return f"{metal.function}{metal.arguments}({', '.join(arguments)})"
