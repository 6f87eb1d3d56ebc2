"""What may be slow in a kernel, or refused by some Macs, as far as clang can tell: nothing."""

from collections.abc import Callable

import mlx.core as mx
import pytest
from metal_emulator import LintError

from mlx_kimi.metal_kernels import source
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
from mlx_kimi.metal_kernels.kernel import use_backend
from mlx_kimi.metal_kernels.sorted_experts import sorted_experts
from mlx_kimi.metal_kernels.tuning import ExpertForm
from tests import (
    kda_cases,
    test_kernels_add_norm,
    test_kernels_experts,
    test_kernels_kda_decode,
    test_kernels_kda_prepare,
    test_kernels_mla,
    test_kernels_mla_prefill,
)
from tests.kernel_cases import linter

DTYPE = mx.bfloat16


def published_experts(
    bits: int, group: int, mode: str, dtype: mx.Dtype = DTYPE
) -> list[SwiGLUWeights]:
    """Two routed experts of the 48B's sizes, and the shared one."""
    return [
        SwiGLUWeights(
            *(
                test_kernels_experts.random_matrix((*lead, *shape), bits, group, dtype, mode)
                for shape in ((1024, 2304), (1024, 2304), (2304, 1024))
            )
        )
        for lead in ((2,), ())
    ]


def experts(bits: int, group: int = 64, mode: str = "affine") -> None:
    chosen, x = mx.zeros((1, 8), mx.int32), mx.ones((1, 2304), DTYPE)
    expert_mlp(x, chosen, mx.ones((1, 8)), *published_experts(bits, group, mode))


def many_experts(
    bits: int, group: int = 64, mode: str = "affine", tiles: int = 4, dtype: mx.Dtype = DTYPE
) -> None:
    form = ExpertForm(0, "tiles" if tiles else "vectors", tiles)
    x, chosen = mx.ones((16, 2304), dtype), mx.zeros((16, 8), mx.int32)
    sorted_experts(x, chosen, *published_experts(bits, group, mode, dtype), form)


def combination() -> None:
    y, places = mx.zeros((16, 2304), DTYPE), mx.zeros((2, 8), mx.int32)
    expert_combine(y, places, mx.ones((2, 8)), y[:2])


def delta_rule(run: Callable[..., object]) -> None:
    q, k, v, *rest = kda_cases.case("typ", T=32, H=2, Dk=128).arrays()
    run(*(x.astype(DTYPE) for x in (q, k, v)), *rest)


def finish() -> None:
    shape, gate = (1, 2, 32, 128), mx.zeros((1, 2, 4096), DTYPE)
    kda_finish_kernel(mx.zeros(shape), gate, mx.ones(128, DTYPE), 1e-5)


def mla(packed: bool = False) -> None:
    sizes = test_kernels_mla.PUBLISHED
    given = test_kernels_mla.case(sizes, bits=8, group_size=64, dtype=DTYPE, packed=packed)
    given.run()


def prefill() -> None:
    sizes = test_kernels_mla_prefill.Sizes(32, 128, 64, 128, 512)
    test_kernels_mla_prefill.case(sizes=sizes, dtype=DTYPE).run()


def decode(bits: int) -> None:
    kda_decode(*test_kernels_kda_decode.case(H=2, D=128, bits=bits, group_size=64, dtype=DTYPE))


def scores(bits: int) -> None:
    add_norm_scores(*test_kernels_experts.scored(1, 256, 2304, bits, DTYPE))


LAUNCHES: dict[str, Callable[[], object]] = {
    "add_norm": lambda: add_norm_kernel(*test_kernels_add_norm.case((1, 2304), DTYPE), 1e-5),
    "add_norm_scores": lambda: scores(0),
    "add_norm_scores of 8 bits": lambda: scores(8),
    "expert_select": lambda: expert_select(
        mx.zeros((1, 256)), mx.zeros((256,)), 8, 1, 1, True, 2.446
    ),
    "expert_select of groups": lambda: expert_select(
        mx.zeros((1, 256)), mx.zeros((256,)), 8, 8, 4, True, 2.446
    ),
    "experts of 4 bits": lambda: experts(4),
    "experts of 8 bits": lambda: experts(8),
    "experts of 16 bits": lambda: experts(0),
    "experts of 3 bits": lambda: experts(3),
    "experts of 5 bits": lambda: experts(5),
    "experts of nvfp4": lambda: experts(4, 16, "nvfp4"),
    "experts of mxfp8": lambda: experts(8, 32, "mxfp8"),
    "many tokens' experts of 4 bits": lambda: many_experts(4),
    "many tokens' experts of 4 bits, one tile": lambda: many_experts(4, tiles=1),
    "many tokens' experts of 4 bits, vectors": lambda: many_experts(4, tiles=0),
    "many tokens' experts of 8 bits, vectors": lambda: many_experts(8, tiles=0),
    "many tokens' experts of 16 bits, vectors": lambda: many_experts(0, tiles=0),
    "many tokens' experts of 5 bits, vectors": lambda: many_experts(5, tiles=0),
    "many tokens' experts of 8 bits": lambda: many_experts(8),
    "many tokens' experts of 16 bits": lambda: many_experts(0),
    "many tokens' experts in float32": lambda: many_experts(0, tiles=2, dtype=mx.float32),
    "many tokens' experts of 8 bits in float32": lambda: many_experts(8, tiles=2, dtype=mx.float32),
    "many tokens' experts of 8 bits in float16": lambda: many_experts(8, dtype=mx.float16),
    "many tokens' experts of 3 bits": lambda: many_experts(3),
    "many tokens' experts of 5 bits": lambda: many_experts(5),
    "many tokens' experts of nvfp4": lambda: many_experts(4, 16, "nvfp4"),
    "many tokens' experts of mxfp8": lambda: many_experts(8, 32, "mxfp8"),
    "expert_combine": combination,
    "kda_sequential": lambda: delta_rule(kda_sequential_kernel),
    "kda_chunk": lambda: delta_rule(kda_chunk_kernel),
    "kda_decode": lambda: decode(0),
    "kda_decode of 8 bits": lambda: decode(8),
    "kda_prepare": lambda: kda_prepare_kernel(test_kernels_kda_prepare.case(D=128, dtype=DTYPE)),
    "kda_finish": finish,
    "mla_decode": mla,
    "mla_decode of packed latents": lambda: mla(packed=True),
    "mla_prefill": prefill,
}


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES)
def test_the_review_finds_nothing(launch: str) -> None:
    """No array in memory, no call, no component chosen at run time; buffers and registers do."""
    remarks: list[str] = []
    with use_backend(lambda kernel: linter(kernel.inputs, remarks)(kernel)):
        LAUNCHES[launch]()
    assert not remarks, "\n".join(remarks)


PLANTED = {  # in the kernel's body or a header of it: what is found where
    ("expert_select", "expert_select.metal"): (
        "float merits[Owned];",
        "float merits[Owned]; merits[lane % Owned] = 0;",
        "expert_select.metal:23: 'merits', [8 x float], stays in memory",
    ),
    ("expert_select", "activations.h"): (
        "METAL_FUNC float sigmoid_as_written",
        "inline float sigmoid_as_written",
        "activations.h:8: 'sigmoid_as_written' is not forced inline",
    ),
}


@pytest.mark.parametrize("kernel, file", PLANTED)
def test_what_is_planted_is_named_by_file_and_line(
    kernel: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after, message = PLANTED[kernel, file]
    plain = source.text_of
    assert plain(file).count(before) == 1
    monkeypatch.setattr(
        source, "text_of", lambda f: plain(f).replace(before, after) if f == file else plain(f)
    )
    remarks: list[str] = []
    with use_backend(linter((), remarks)):
        LAUNCHES[kernel]()
    assert any(message in remark for remark in remarks), remarks


def test_a_word_that_metal_reserves_is_named_by_file_and_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = source.text_of
    monkeypatch.setattr(source, "text_of", lambda f: plain(f).replace("elements", "fragment"))
    expected = "tiles.h:25: error: 'fragment' is a reserved word of Metal"
    with use_backend(linter()), pytest.raises(LintError, match=expected):
        prefill()
