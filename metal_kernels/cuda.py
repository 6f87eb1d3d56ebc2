"""Kernels on NVIDIA GPUs: the Metal text behind a header that gives CUDA Metal's language.

A kernel becomes a function in the header of a CUDA kernel, whose own body is one call of it:
template values, scalars and thread positions then mean what they mean in Metal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from hashlib import sha256
from math import prod
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_kimi.metal_kernels.source import text_of, without_comments

if TYPE_CHECKING:
    from mlx_kimi.metal_kernels.kernel import Kernel, Launch

# `threadgroup T x[N];` declares storage; a pointer has its `*` between T and x.
_STORAGE = re.compile(r"\bthreadgroup\s+(?=[A-Za-z_][\w:]*(?:<[^;{}()]*?>)?\s+\w+\s*[\[;,])")
_PLACE = re.compile(r"^inline (uint3?) (\w+)\(\)", re.MULTILINE)  # namespace place of cuda.h
_INSTEAD = {"tiles.h": "cuda_tiles.h"}  # the same functions for another layout of tiles
_HEADER = """{language}
namespace msl {{
{header}
{template}void kernel({parameters}) {{
{source}
}}
inline void entry({buffers}) {{ kernel{values}({arguments}); }}
}}  // namespace msl
#undef device
#undef constant
#undef thread
#undef threadgroup
// This says that one threadgroup fills a processor, so a thread has registers to load ahead: the
// scan of kda_chunk takes half the time. The signature is MLX's to write.
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__({threads}, 1)
"""


@dataclass(frozen=True)
class CudaText:
    """What `mx.fast.cuda_kernel` takes."""

    header: str
    body: str


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
        if grid[0] % threadgroup[0] or grid[1] % threadgroup[1] or grid[2] % threadgroup[2]:
            raise ValueError(
                f"[{self.name}] the grid must be a multiple of the threadgroup on NVIDIA GPUs but "
                f"{grid} is not of {threadgroup}."
            )
        # (Of a prompt's few hundred launches, each made by Python: short of what its text needs.)
        arrays = [x if type(x) is mx.array else _scalar(x) for x in inputs]
        kinds = [x.dtype for x in arrays], [x.ndim > 0 for x in arrays]
        key = (*kinds[0], *kinds[1], *output_dtypes, *template, *threadgroup)
        launch = self._built.get(key)
        if launch is None:
            text = self.text(arrays, output_dtypes, template, prod(threadgroup))
            launch = self._built[key] = self._build(text)
        outputs: list[mx.array] = launch(
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
        """The CUDA text for inputs and outputs of these types, and so many threads a threadgroup.

        Raises:
            ValueError: the text asks for an input's shape, strides or number of dimensions.
        """
        arrays = dict(zip(self.input_names, inputs, strict=True))
        self._refuse_shapes(arrays)
        given = [_buffer(n, f"const {_type(x.dtype)}", x.ndim == 0) for n, x in arrays.items()]
        given += [_buffer(n, _type(d)) for n, d in zip(self.output_names, dtypes, strict=True)]
        given += [place for name, place in _places().items() if name in self.source]
        parameters, arguments = (", ".join(each) for each in zip(*given, strict=True))
        buffers = [*self.input_names, *self.output_names]
        header = _HEADER.format(
            language=text_of("cuda.h"),
            header=_STORAGE.sub("__shared__ ", self.header),
            source=_STORAGE.sub("__shared__ ", self.source),
            template=_template(template),
            values=_values(template),
            parameters=parameters,
            arguments=arguments,
            buffers=", ".join(f"const void* {name}" for name in buffers),
            threads=threads,
        )
        return CudaText(without_comments(header), f"  msl::entry({', '.join(buffers)});")

    def _refuse_shapes(self, arrays: dict[str, mx.array]) -> None:
        whats = ("shape", "strides", "ndim")
        names = sorted(f"{name}_{what}" for name, x in arrays.items() if x.ndim for what in whats)
        if asked := [name for name in names if name in self.source]:
            raise ValueError(f"no {', '.join(asked)} on NVIDIA GPUs")

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


def _template(values: Sequence[tuple[str, Any]]) -> str:
    """The line before a function of template values; nothing if there are none."""
    kinds = {mx.Dtype: "typename", bool: "bool"}
    names = ", ".join(f"{kinds.get(type(value), 'int')} {name}" for name, value in values)
    return f"template <{names}>\n" if names else ""


def _values(template: Sequence[tuple[str, Any]]) -> str:
    values = (_type(v) if isinstance(v, mx.Dtype) else str(int(v)) for _, v in template)
    return f"<{', '.join(values)}>" if template else ""


def _type(dtype: mx.Dtype) -> str:
    """Its name in Metal, as MLX writes it."""
    name = str(dtype).removeprefix("mlx.core.")
    return {"bool": "bool", "float32": "float"}.get(name, f"{name}_t")


Given = tuple[str, str]  # a parameter of the kernel's function, and the argument of its call


def _buffer(name: str, kind: str, scalar: bool = False) -> Given:
    if scalar:
        return f"{kind}& {name}", f"*({kind}*){name}"
    # Outputs are arrays of their own, so that no store stands between two loads.
    return f"{kind}* __restrict__ {name}", f"({kind}*){name}"


@cache
def _places() -> dict[str, Given]:
    """A thread's position and its kin, by the names that a text asks for them with."""
    found = _PLACE.findall(text_of("cuda.h"))
    return {name: (f"{kind} {name}", f"metal::place::{name}()") for kind, name in found}
