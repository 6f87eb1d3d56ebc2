"""Compiles the CUDA text of kernels with NVRTC, NVIDIA's compiler as a library. Needs no GPU."""

from __future__ import annotations

import ctypes
import re
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_kimi.metal_kernels.cuda import CudaText, cuda
from mlx_kimi.metal_kernels.kernel import Kernel

CUDA = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"
# 9.0 is what figures were measured on; 12.0 has no fast products of doubles.
ARCHITECTURES = ("compute_90", "compute_120")  # PTX, no assembly
OPTIONS = (
    "--device-as-default-execution-space",
    "--device-debug",  # not optimized, in half the time: the text is tested, not its assembly
    f"--include-path={CUDA / 'include'}",
)
TYPES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.int32: "int32_t",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
}
# What MLX puts around a custom kernel, but for its own headers, which the CPU wheel lacks.
SURROUNDINGS = """
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
#define inf __int_as_float(0x7f800000)
{header}
namespace mlx::core::cu {{
__global__ void kernel({parameters}) {{
{body}
}}
}}
"""


class NvrtcError(Exception):
    """What the compiler says."""


def nvrtc(kernel: Kernel) -> Callable[..., list[mx.array]]:
    """A backend that compiles each call and answers with zeros."""

    def launch(
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] = (),
        **_: Any,
    ) -> list[mx.array]:
        assert not any(g % t for g, t in zip(grid, threadgroup, strict=True)), kernel.name
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        text = cuda(kernel).text(arrays, output_dtypes, template, prod(threadgroup))
        buffers = [
            f"const {TYPES[x.dtype]}* {name}" for name, x in zip(kernel.inputs, arrays, strict=True)
        ]
        buffers += [
            f"{TYPES[d]}* {name}" for name, d in zip(kernel.outputs, output_dtypes, strict=True)
        ]
        for architecture in ARCHITECTURES:
            compile_cuda(kernel.name, text, buffers, architecture)
        return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

    return launch


def compile_cuda(name: str, text: CudaText, parameters: Sequence[str], architecture: str) -> bytes:
    """The machine code of a kernel.

    Raises:
        NvrtcError: the compiler refuses the text, or warns.
    """
    source = SURROUNDINGS.format(
        header=text.header, body=text.body, parameters=", ".join(parameters)
    )
    library, program = _library(), ctypes.c_void_p()
    code = library.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None
    )
    assert code == 0, f"nvrtcCreateProgram: {code}"
    try:
        options = [o.encode() for o in (*OPTIONS, f"--gpu-architecture={architecture}")]
        arguments = (ctypes.c_char_p * len(options))(*options)
        failed = library.nvrtcCompileProgram(program, len(options), arguments)
        messages = _part(program, "ProgramLog").decode().strip("\0\n ")
        if failed or re.search(r"\bwarning\b", messages):
            raise NvrtcError(messages)
        return _part(program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _part(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    assert getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
    buffer = ctypes.create_string_buffer(size.value)
    assert getattr(_library(), f"nvrtcGet{what}")(program, buffer) == 0
    return buffer.raw


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(CUDA / "lib" / "libnvrtc.so.13"))
