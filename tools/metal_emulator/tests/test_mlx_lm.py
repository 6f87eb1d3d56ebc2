"""A check by strangers: mlx-lm's own kernels, unchanged, against its forms in array operations."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx_lm.models.gated_delta
import numpy as np
import pytest
from close import assert_close, assert_same_bits
from metal_emulator import findings, metal_kernel

ROUNDING = {mx.float32: 2e-6, mx.float16: 6e-4, mx.bfloat16: 4.5e-3}  # one, of the outputs
DTYPES = pytest.mark.parametrize("dtype", ROUNDING)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a module builds with `mx.fast.metal_kernel` from here on runs on the emulator."""
    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)


class Delta(SimpleNamespace):
    """Arguments of the gated delta rule: a gate per channel, or one per head."""

    @classmethod
    def random(cls, dtype: mx.Dtype, per_channel: bool, B: int = 2, T: int = 5) -> "Delta":
        rng = np.random.default_rng(1)
        Hk, Hv, D = 1, 2, 128

        def normal(*shape: int) -> mx.array:
            return mx.array(rng.standard_normal(shape).astype(np.float32))

        def uniform(low: float, *shape: int) -> mx.array:
            return mx.array(rng.uniform(low, 1, shape).astype(np.float32))

        gates = (B, T, Hv, D) if per_channel else (B, T, Hv)
        inputs = [
            normal(B, T, Hk, D) / D**0.5,
            normal(B, T, Hk, D) / D**0.5,
            normal(B, T, Hv, D),
            uniform(0.8, *gates),
            uniform(0, B, T, Hv),
        ]
        return cls(tokens=[x.astype(dtype) for x in inputs], state=normal(B, Hv, D, D))

    def run(self, kernel: Any, rows: int, *mask: mx.array) -> list[mx.array]:
        """`rows` of the state's 128 to a simdgroup."""
        v = self.tokens[2]
        B, T, Hv, Dv = v.shape
        types = [("InT", v.dtype), ("StT", mx.float32)]
        sizes = [("Dk", 128), ("Dv", Dv), ("Hk", 1), ("Hv", Hv)]
        return kernel(
            inputs=[*self.tokens, self.state, T, *mask],
            template=[*types, *sizes],
            grid=(32, Dv // rows, B * Hv),
            threadgroup=(32, 4, 1),
            output_shapes=[v.shape, self.state.shape],
            output_dtypes=[v.dtype, mx.float32],
        )

    def expected(self) -> tuple[mx.array, mx.array]:
        q, k, v, g, beta = (x.astype(mx.float32) for x in self.tokens)
        return mlx_lm.models.gated_delta.gated_delta_ops(q, k, v, g, beta, self.state)


@DTYPES
def test_one_row_delta_kernel(emulated: None, dtype: mx.Dtype) -> None:
    case = Delta.random(dtype, per_channel=True)
    kernel = mlx_lm.models.gated_delta._make_gated_delta_kernel(vectorized=True)
    (y, state), (expected_y, expected_state) = case.run(kernel, rows=1), case.expected()
    assert_close("y", y, expected_y, ROUNDING[dtype])
    assert_close("state", state, expected_state, ROUNDING[mx.float32])


@DTYPES
def test_packed_delta_kernel_has_the_bits_of_its_comparators(
    emulated: None, dtype: mx.Dtype
) -> None:
    """mlx-lm promises the same bits of packed and unpacked sums, and of simd_sum on Apple GPUs."""
    module = mlx_lm.models.gated_delta
    case = Delta.random(dtype, per_channel=False)
    y, state = case.run(module._make_gated_delta_packed_kernel(), rows=8)
    assert_close("y", y, case.expected()[0], ROUNDING[dtype])
    for make in (module._make_gated_delta_kernel_xtree, module._make_gated_delta_kernel):
        other_y, other_state = case.run(make(), rows=1)
        assert_same_bits("y", y.astype(mx.float32), other_y.astype(mx.float32))
        assert_same_bits("state", state, other_state)


def test_masked_delta_kernel_writes_one_element_from_every_lane(emulated: None) -> None:
    """All lanes write the zero of a masked token: harmless today, and no rule allows it."""
    case = Delta.random(mx.float32, per_channel=True)
    kernel = mlx_lm.models.gated_delta._make_gated_delta_kernel(has_mask=True, vectorized=True)
    everything = mx.ones((2, 5), mx.bool_)
    y, _ = case.run(kernel, 1, everything)
    assert_close("y", y, case.expected()[0], ROUNDING[mx.float32])
    with pytest.raises(findings.Race) as raised:
        case.run(kernel, 1, mx.zeros_like(everything))
    assert raised.value.buffer == "y"


@DTYPES
def test_norm_and_gate_kernel_takes_strides(
    monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype
) -> None:
    module = import_module("mlx_lm.kernels.rms_norm_sigmoid_gate")
    kernel = metal_kernel(
        "rms_norm_sigmoid_gate",
        ["x", "g", "eps"],
        ["out"],
        module._NORM_GATE_SOURCE,
        ensure_row_contiguous=False,
    )
    monkeypatch.setattr(module, "_norm_gate_kernel", kernel)
    B, H, L, D = 2, 3, 5, 96
    rng = np.random.default_rng(2)
    x = mx.array(rng.standard_normal((B, L, H, D)).astype(np.float32)).astype(dtype)
    gate = mx.array(rng.standard_normal((B, L, H * D)).astype(np.float32)).astype(dtype)
    out = module.rms_norm_sigmoid_gate(x.swapaxes(1, 2), gate, eps=1e-5)
    normed = mx.fast.rms_norm(x.astype(mx.float32), None, 1e-5).reshape(B, L, H * D)
    assert_close("out", out, normed * mx.sigmoid(gate.astype(mx.float32)), ROUNDING[dtype])


def test_expert_routing_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("mlx_lm.kernels.expert_routing")
    names = ["logits", "bias", "multiplier", "eps", "scale"]
    kernel = metal_kernel("expert_routing", names, ["inds", "weights"], module._ROUTING_SOURCE)
    monkeypatch.setattr(module, "_routing_kernel", kernel)
    rng = np.random.default_rng(4)
    logits, bias = rng.standard_normal((9, 72)), rng.standard_normal(72)
    experts, weights = module.expert_routing(
        mx.array(logits.astype(np.float32)),
        mx.array(bias.astype(np.float32)),
        top_k=6,
        multiplier=1.5,
        score_eps=1e-20,
        route_scale=2.0,
    )
    scores = 1 / (1 + np.exp(-1.5 * logits))
    expected = np.argsort(-(scores + bias), axis=-1)[:, :6]
    chosen = np.take_along_axis(scores, expected, -1)
    assert_same_bits("experts", experts, expected.astype(np.uint32))
    assert_close("weights", weights, 2 * chosen / chosen.sum(-1, keepdims=True), 1e-6)
