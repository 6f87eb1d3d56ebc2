"""What may be slow is found where it is planted, and nowhere else."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec, module_from_spec
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx_lm.models.gated_delta as gated_delta
import pytest
from metal_emulator import LintError, Remark, lint, lint_kernel, review
from metal_emulator.registers import registers
from test_mlx_lm import Delta

FLOATS = {"a": mx.float32}
OUT = {"out": mx.float32}
WRITE = "\nout[thread_position_in_grid.x] = x;"


def remarks(source: str, header: str = "", **how: Any) -> list[str]:
    """Of a snippet that computes x."""
    return [
        str(each) for each in review("snippet", source + WRITE, FLOATS, OUT, header=header, **how)
    ]


CHOICE = """// a choice of lvalues
METAL_FUNC float sum(thread float* y, uint lane) {
  #pragma unroll
  for (int width = 8; width > 0; width /= 2) {
    #pragma unroll
    for (int i = 0; i < width; ++i) {
      const bool upper = (lane & width) != 0;
      CHOSEN;
      y[i] += simd_shuffle_xor(sent, width);
    }
  }
  return y[0];
}
"""
SIXTEEN = """float y[16];
#pragma unroll
for (int i = 0; i < 16; ++i) y[i] = a[i];
"""
HELPER = """// of many
FORCED float largest(thread float* y) {
  float most = y[0];
  for (int i = 1; i < 16; ++i) most = precise::exp(most) > y[i] ? most : y[i];
  return most;
}
"""
CALLS = SIXTEEN + "float x = largest(y); y[2] = x; x += largest(y); y[3] = x; x += largest(y);"


def test_a_choice_between_elements_keeps_an_array_in_memory() -> None:
    body = SIXTEEN + "float x = sum(y, thread_index_in_simdgroup);"
    choice = CHOICE.replace("CHOSEN", "const float sent = upper ? y[i] : y[i + width]")
    [found] = remarks(body, choice)
    assert found.startswith("snippet: line 1: 'y', [16 x float], stays in memory: ")
    assert "header line 8 has an index known only at run time" in found
    values = "const float low = y[i], high = y[i + width], sent = upper ? low : high"
    assert not remarks(body, CHOICE.replace("CHOSEN", values))


def test_an_index_known_at_run_time_keeps_an_array_in_memory() -> None:
    [found] = remarks(SIXTEEN + "\nfloat x = y[thread_index_in_simdgroup % 16];")
    assert found.startswith("snippet: line 1: 'y', [16 x float], stays in memory: ")
    assert "line 5 has an index known only at run time" in found
    assert not remarks(SIXTEEN + "\nfloat x = y[3] + y[15];")


def test_an_array_that_is_copied_whole_stays_in_memory() -> None:
    shift = "for (int t = 0; t < 9; ++t) {{ {} y[3] = a[t]; x += y[0] * y[1] + y[2]; }}"
    shifted = shift.format("for (int i = 0; i < 3; ++i) y[i] = y[i + 1];")
    found = remarks(f"float y[4] = {{1, 2, 3, 4}}; float x = 0;\n{shifted}")
    assert all("line 1: 'y', [4 x float], stays in memory" in each for each in found)


def test_an_array_of_a_structure_stays_in_memory() -> None:
    header = "struct Pair { float v[2]; float w; };\n"
    body = "Pair p; p.v[0] = a[0]; p.v[1] = a[1]; p.w = 1;\nfloat x = p.w + p.v[{}];"
    [found] = remarks(body.format("thread_index_in_simdgroup & 1"), header)
    assert found.startswith("snippet: line 1: 'p'") and "line 2 has an index" in found
    assert not remarks(body.format("1"), header)


def test_helpers_that_are_not_forced_inline_are_named() -> None:
    found = remarks(CALLS, HELPER.replace("FORCED", "inline"))
    assert found[0].startswith("snippet: header line 2: 'largest' is not forced inline")
    assert "clang leaves it a call" in found[0] and "a thread's own" in found[0]
    assert "'y', [16 x float], stays in memory" in found[1] and "hands it to largest" in found[1]
    assert not remarks(CALLS, HELPER.replace("FORCED", "METAL_FUNC"))
    [small] = remarks("float x = once(a[0]);", "inline float once(float y) { return y + 1; }\n")
    assert small == (
        "snippet: header line 1: 'once' is not forced inline (METAL_FUNC): "
        "a compiler may leave it a call"
    )


def test_a_component_chosen_at_run_time_is_named() -> None:
    four = "float4 y = float4(a[0], a[1], a[2], a[3]);\nfloat x = y[{}];"
    [found] = remarks(four.format("thread_index_in_simdgroup & 3"))
    assert found.startswith("snippet: line 2: a component of a vector")
    assert not remarks(four.format("3"))


def test_more_than_24_buffers_are_named() -> None:
    names = [f"input{i}" for i in range(24)]
    source = "out[thread_position_in_grid.x] = input0[0];"
    [found] = review("snippet", source, dict.fromkeys(names, mx.float32), OUT)
    assert (found.where, found.what) == ("signature", "25 buffers")
    assert not review("snippet", source, dict.fromkeys(names[:23], mx.float32), OUT)


@pytest.mark.parametrize(
    "alias", ["typedef float Row[4];", "using Row = float[4];", "using Row = vec<float, 2>[2];"]
)
@pytest.mark.parametrize("use", ["thread Row&", "const thread Row&", "thread const Row&"])
def test_an_address_space_on_an_alias_of_an_array_is_named(alias: str, use: str) -> None:
    header = f"{alias}\n\nMETAL_FUNC float first({use} y) {{ return 1; }}\n"
    assert not remarks("float x = 1;", f"typedef float Row;\n{header.partition(';')[2]}")
    [found] = remarks("Row y; float x = first(y);", header)
    assert found.startswith("snippet: header line 3: address space on an alias: 'Row'")


def many(values: int) -> str:
    """A body with so many floats alive at once."""
    loads = "".join(f"float y{i} = a[thread_index_in_simdgroup + {i}];\n" for i in range(values))
    total = " + ".join(f"y{i} * simd_sum(y{i})" for i in range(values))
    return f"{loads}simdgroup_barrier(mem_flags::mem_device);\nfloat x = {total};"


def test_more_registers_than_a_threadgroup_has_are_named() -> None:
    for values, threads, allowed in ((80, 512, True), (120, 512, False), (120, 256, True)):
        found = remarks(many(values), threads=threads)
        assert (not found) == allowed, (values, threads, found)
    [found] = remarks(many(80), threads=1024)
    assert "an estimate: a threadgroup of 1024 threads leaves 52" in found
    assert not remarks(many(120))


def test_registers_are_values_alive_at_once() -> None:
    body = """entry:
  %a = load float, ptr %p, align 4
  %b = getelementptr i8, ptr %p, i64 4
  %c = load <4 x float>, ptr %b, align 16
  %d = extractelement <4 x float> %c, i64 0
  %e = fadd float %a, %d
  %f = fcmp olt float %e, %a
  br i1 %f, label %then, label %end
then:
  %g = fptrunc float %e to half
  %h = fpext half %g to float
  br label %end
end:
  %i = phi float [ %h, %then ], [ %a, %entry ]
  store float %i, ptr %p, align 4
  ret void"""
    assert registers(body.split("\n")) == 5  # %a and the four of %c


def test_lint_raises_for_both_classes_where_it_is_asked_to() -> None:
    source = SIXTEEN + "float x = y[thread_index_in_simdgroup % 16];" + WRITE
    lint("snippet", source, FLOATS, OUT, large=FLOATS)
    with pytest.raises(LintError, match="stays in memory"):
        lint("snippet", source, FLOATS, OUT, large=FLOATS, strict=True)


# ----------------------------------------------------------------------------- texts of strangers
@pytest.mark.slow
def test_kernels_of_mlx_lm_would_compile_and_one_keeps_arrays_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[Remark] = []
    built = partial(lint_kernel, remarks=found)
    monkeypatch.setattr(mx.fast, "metal_kernel", built)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    for per_channel in (True, False):
        case, how = Delta.random(mx.bfloat16, per_channel), {"vectorized": per_channel}
        case.run(gated_delta._make_gated_delta_kernel(**how), 1)
        mask = mx.ones((2, 5), mx.bool_)
        case.run(gated_delta._make_gated_delta_kernel(has_mask=True, **how), 1, mask)
    case.run(gated_delta._make_gated_delta_kernel_xtree(), 1)
    assert not found
    case.run(gated_delta._make_gated_delta_packed_kernel(), 8)
    assert [each.what for each in found] == [
        "'state', [32 x float], stays in memory",
        "'part', [8 x float], stays in memory",
    ]


def fresh(name: str) -> Any:
    """A module loaded once more, with kernels of this moment's `mx.fast.metal_kernel`."""
    spec = find_spec(name)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def norm(weight: mx.array) -> Any:
    return SimpleNamespace(weight=weight, eps=1e-5)


BF16 = mx.bfloat16
HEADS: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 64}
QKVG = mx.zeros((2, 8, 768), BF16)
STRANGERS: dict[str, Callable[[Any], object]] = {
    "kernels.qk_norm": lambda m: m.qk_norm(QKVG, **HEADS, eps=1e-5, query_scale=1.0),
    "kernels.qk_norm_rope": lambda m: m.qk_norm_rope(
        QKVG, **HEADS, eps=1e-5, query_scale=1.0, rope_base=1e4, offset=3
    ),
    "kernels.post_expert_norm_combine": lambda m: m.post_expert_norm_combine(
        mx.zeros((2, 8, 512), BF16), mx.zeros((2, 8)), norm_weight=mx.ones(512), eps=1e-5
    ),
    "kernels.norm_add_norm": lambda m: m.pre_norm(
        m.norm_add_norm(
            mx.zeros((2, 512), BF16),
            mx.zeros((2, 512)),
            alpha=mx.ones(512),
            beta=mx.ones(512),
            post_weight=mx.ones(512),
            post_eps=1e-5,
            next_norm=norm(mx.ones(512)),
        )[0],
        norm(mx.ones(512)),
        dtype=BF16,
    ),
    "kernels.rms_norm_sigmoid_gate": lambda m: m.rms_norm_sigmoid_gate(
        mx.ones((2, 3, 5, 96)), mx.ones((2, 5, 288)), eps=1e-5
    ),
    "kernels.expert_routing": lambda m: m.expert_routing(
        mx.zeros((9, 72)), mx.zeros(72), top_k=6, multiplier=1.5, score_eps=0.0, route_scale=2.0
    ),
    "models.rwkv7": lambda m: m.wkv7_kernel(*[QKVG[:, None, :, :64]] * 6, mx.ones((2, 8, 64, 64))),
}
# Loops that clang does not unroll, and a helper that is plainly `inline`.
SLOW = {
    "kernels.expert_routing": ["'w', [6 x float], stays in memory"],
    "kernels.post_expert_norm_combine": [
        "'x', [8 x [4 x bfloat]], stays in memory",
        "'sum_sq', [8 x float], stays in memory",
    ],
    "kernels.norm_add_norm": [
        "'block_sum_once' is not forced inline (METAL_FUNC)",
        *(f"'{name}', [8 x float], stays in memory" for name in ("v", "st", "al", "be", "pw")),
        "'block_sum_once' is not forced inline (METAL_FUNC)",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRANGERS)
def test_kernels_of_strangers_would_compile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Remark] = []
    monkeypatch.setattr(mx.fast, "metal_kernel", partial(lint_kernel, remarks=found))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    STRANGERS[name](fresh(f"mlx_lm.{name}"))
    assert [each.what for each in found] == SLOW.get(name, []), found
