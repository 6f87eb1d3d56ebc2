"""Every kernel's CUDA text, through NVIDIA's own compiler. Running it takes an NVIDIA GPU."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi.metal_kernels import cuda
from mlx_kimi.metal_kernels.add_norm import add_norm_kernel
from mlx_kimi.metal_kernels.experts import (
    SwiGLUWeights,
    add_norm_scores,
    expert_combine,
    expert_mlp,
    expert_select,
)
from mlx_kimi.metal_kernels.kda_chunk import kda_chunk_kernel
from mlx_kimi.metal_kernels.kda_decode import kda_decode
from mlx_kimi.metal_kernels.kda_prepare import kda_finish_kernel, kda_prepare_kernel
from mlx_kimi.metal_kernels.kda_sequential import kda_sequential_kernel
from mlx_kimi.metal_kernels.kernel import backend, use_backend
from mlx_kimi.metal_kernels.sorted_experts import sorted_experts
from mlx_kimi.metal_kernels.tuning import BASE, NVIDIA, AttendShape, ExpertForm, PrefillShape
from tests.kda_cases import case
from tests.kernel_cases import FORMATS, matrix
from tests.nvrtc import NvrtcError, compile_cuda, nvrtc
from tests.test_kernels_experts import gated
from tests.test_kernels_kda_decode import case as decode_case
from tests.test_kernels_kda_prepare import case as prepare_case
from tests.test_kernels_mla import POCKET, PUBLISHED
from tests.test_kernels_mla import case as mla_case
from tests.test_kernels_mla_prefill import Sizes
from tests.test_kernels_mla_prefill import case as prefill_attention

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
of_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.slow
@of_dtype
@pytest.mark.parametrize("D", [64, 128])
def test_the_delta_rule_compiles(dtype: mx.Dtype, D: int) -> None:
    q, k, v, *rest = case("typ", T=17, H=2, Dk=D).arrays()
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    with use_backend(nvrtc):
        kda_sequential_kernel(q, k, v, *rest)
        kda_chunk_kernel(q, k, v, *rest)


@pytest.mark.slow
@of_dtype
@pytest.mark.parametrize("D", [64, 128])
def test_what_stands_around_the_delta_rule_compiles(dtype: mx.Dtype, D: int) -> None:
    with use_backend(nvrtc):
        kda_prepare_kernel(prepare_case(D=D, dtype=dtype))
        gate = mx.zeros((1, 2, 2 * D), dtype)
        kda_finish_kernel(mx.zeros((1, 2, 2, D)), gate, mx.ones(D, dtype), 1e-5)


@pytest.mark.slow
@of_dtype
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_the_decode_step_compiles(dtype: mx.Dtype, bits: int) -> None:
    with use_backend(nvrtc):
        kda_decode(*decode_case(bits=bits, dtype=dtype))


@pytest.mark.slow
@of_dtype
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_the_experts_compile(dtype: mx.Dtype, bits: int) -> None:
    x, experts, weights = mx.ones((2, 64), dtype), mx.zeros((2, 3), mx.int32), mx.ones((2, 3))
    routed, shared = gated((5,), 32, 64, bits, 32, dtype), gated((), 32, 64, 4, 32, dtype)
    with use_backend(nvrtc):
        router = gated((), 32, 64, bits, 32, mx.float32).gate
        add_norm_scores(x, x, mx.ones(64, dtype), 1e-5, router)
        expert_combine(mx.ones((6, 64), dtype), experts, weights, x)
        expert_mlp(x, experts, weights, routed, shared)
        expert_mlp(x, experts, weights, routed, None)


@pytest.mark.slow
@of_dtype
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("form", NVIDIA.experts, ids=str)
def test_the_experts_of_many_tokens_compile(dtype: mx.Dtype, bits: int, form: ExpertForm) -> None:
    routed, shared = (gated(lead, 64, 64, bits, 32, dtype) for lead in ((5,), ()))
    x, experts = mx.ones((9, 64), dtype), mx.zeros((9, 3), mx.int32)
    with use_backend(nvrtc):
        sorted_experts(x, experts, routed, shared, form)


@pytest.mark.slow
@pytest.mark.parametrize("mode, bits, group", FORMATS)
def test_every_stored_format_compiles(mode: str, bits: int, group: int) -> None:
    stack, one = (
        matrix(mx.ones((*lead, 128, 128)), bits, group, mx.bfloat16, mode) for lead in ((2,), ())
    )
    x, chosen = mx.ones((1, 128), mx.bfloat16), mx.zeros((1, 2), mx.int32)
    routed, shared = SwiGLUWeights(*[stack] * 3), SwiGLUWeights(*[one] * 3)
    with use_backend(nvrtc):
        expert_mlp(x, chosen, mx.ones((1, 2)), routed, shared)
        sorted_experts(x, chosen, routed, shared, NVIDIA.experts[0])
        given = decode_case(rank=128, bits=bits, group_size=group, mode=mode, dtype=mx.bfloat16)
        kda_decode(*given)


@of_dtype
def test_the_residual_addition_compiles(dtype: mx.Dtype) -> None:
    with use_backend(nvrtc):
        add_norm_kernel(mx.ones((1, 72), dtype), mx.ones((1, 72), dtype), mx.ones(72, dtype), 1e-5)


@pytest.mark.parametrize("groups", [1, 4])
def test_the_choice_of_experts_compiles(groups: int) -> None:
    with use_backend(nvrtc):
        expert_select(mx.zeros((1, 16)), mx.zeros((16,)), 2, groups, 1, True, 1.0)


@pytest.mark.slow
@of_dtype
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_the_latent_step_compiles(dtype: mx.Dtype, bits: int, packed: bool) -> None:
    with use_backend(nvrtc):
        mla_case(POCKET, bits=bits, dtype=dtype, packed=packed).run()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [BASE.attend, NVIDIA.attend], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_the_latent_step_of_the_48b_compiles(shape: AttendShape, packed: bool) -> None:
    with use_backend(nvrtc):
        given = mla_case(PUBLISHED, bits=4, dtype=mx.bfloat16, packed=packed)
        given.run(shape=shape)


@pytest.mark.slow
@of_dtype
@pytest.mark.parametrize("shape", [BASE.prefill, NVIDIA.prefill], ids=str)
def test_attention_of_many_tokens_compiles(dtype: mx.Dtype, shape: PrefillShape) -> None:
    with use_backend(nvrtc):
        prefill_attention(2, 2, sizes=Sizes(1, 128, 64, 128, 512), dtype=dtype).run(shape)


# ------------------------------------------------------------------------------- the translation
def text(source: str, *inputs: mx.array, names: tuple[str, ...] = ("x",)) -> cuda.CudaText:
    kernel = cuda.metal_kernel("test", names, ("y",), source)
    return kernel.text(inputs or [mx.zeros(8)], [mx.float32], [("N", 4)], 32)


def compiles(text: cuda.CudaText, *parameters: str) -> None:
    compile_cuda("test", text, [*(parameters or ["const float* x"]), "float* y"], "sm_90")


def test_a_kernel_of_anyone_compiles() -> None:
    source = """
      threadgroup float shared[N][2], more[4];
      uint lane = thread_index_in_simdgroup;
      auto here = x + N * threadgroup_position_in_grid.x;
      shared[lane % N][0] = simd_sum(here[lane % N]);
      more[lane % 4] = metal::exp(shared[0][0]);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      y[thread_position_in_grid.x] = more[0] + metal::max(shared[N - 1][0], 0.5f);
    """
    found = text(source)
    assert "__shared__ float shared[N][2], more[4];" in found.header
    compiles(found)


def test_a_scalar_is_a_reference_as_in_metal() -> None:
    found = text("y[thread_position_in_grid.x] = x * 2;", mx.array(3))
    compiles(found, "const int* x")


def test_a_pointer_into_threadgroup_memory_is_not_storage() -> None:
    source = """
      threadgroup float4 rows[8];
      const threadgroup float* row = (threadgroup float*)rows;
      y[thread_position_in_grid.x] = row[N] + x[0];
    """
    found = text(source)
    assert found.header.count("__shared__") == 1
    compiles(found)


def test_what_the_compiler_refuses_is_an_error() -> None:
    with pytest.raises(NvrtcError, match="nothing_like_this"):
        compiles(text("y[thread_position_in_grid.x] = nothing_like_this;"))


def test_the_surroundings_are_left_as_they_were() -> None:
    """MLX's own code follows the header: macros for `device` and `thread` would break it."""
    found = text("y[thread_position_in_grid.x] = x[0];")
    body = found.body + "\n int device = 0, thread = device; y[1] = thread;"
    compiles(cuda.CudaText(found.header, body))


def test_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="no x_shape on NVIDIA GPUs"):
        text("y[thread_position_in_grid.x] = x_shape[0];")


def test_a_grid_of_partial_threadgroups_is_refused() -> None:
    kernel = cuda.metal_kernel("test", ("x",), ("y",), "y[thread_position_in_grid.x] = x[0];")
    with pytest.raises(ValueError, match=r"\[test\] the grid must be a multiple"):
        kernel(
            inputs=[mx.zeros(8)],
            grid=(33, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(33,)],
            output_dtypes=[mx.float32],
        )


def test_nvidia_gpus_have_the_backend_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert backend() is cuda.cuda


def test_a_changed_text_is_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX finds compiled kernels by name, also those of an earlier run."""
    built = []

    def build(name: str, **_: object):
        built.append(name)
        return lambda **launch: [mx.zeros(s) for s in launch["output_shapes"]]

    monkeypatch.setattr(mx.fast, "cuda_kernel", build)
    shape = {"grid": (32, 1, 1), "output_shapes": [(32,)], "output_dtypes": [mx.float32]}
    for source in ("y[thread_position_in_grid.x] = x[0];", "y[thread_position_in_grid.x] = x[1];"):
        kernel = cuda.metal_kernel("test", ("x",), ("y",), source)
        for x in (mx.zeros(8), mx.zeros(8, mx.float16), mx.zeros(9)):
            kernel(inputs=[x], threadgroup=(32, 1, 1), **shape)
        kernel(inputs=[mx.zeros(8)], threadgroup=(16, 1, 1), **shape)
    assert len(built) == len(set(built)) == 6
    assert np.all([name.startswith("test_") for name in built])
