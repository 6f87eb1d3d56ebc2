"""Kimi Delta Attention in MLX operations against float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.evaluation.mlx_ops.case import (
    SEVERAL_ROUNDINGS,
    TOKENS,
    Case,
    at_random,
    operator_case,
    result_of,
)
from mlx_kimi.evaluation.mlx_ops.float64 import Float64, numbers, sigmoid
from mlx_kimi.metal_kernels.kda_chunk import kda_chunk
from mlx_kimi.metal_kernels.kda_prepare import Projected, naive_kda_finish, naive_kda_prepare
from mlx_kimi.metal_kernels.kda_sequential import naive_kda
from mlx_kimi.model.kda import KimiDeltaAttention


def kda_cases(layer: KimiDeltaAttention, config: ModelConfig, dtype: mx.Dtype) -> Iterator[Case]:
    H, D, taps = layer.heads, layer.head_dim, layer.taps
    for T in TOKENS:
        x = at_random((1, T, layer.in_proj.width), dtype, 1)
        f = at_random((1, T, H * D), dtype, 2)
        tail = at_random((1, taps.shape[0] - 1, taps.shape[1]), dtype, 3)
        for lengths in (None, mx.array([T - 1])):
            given = Projected(x, f, taps, tail, lengths, layer.A_log, layer.dt_bias)
            for index, part in enumerate(("q", "k", "v", "alpha", "beta", "tail")):
                if lengths is not None and part in "qkv":
                    continue  # (of padding they mean nothing)
                name = f"kda_prepare ({part})"
                padded = "" if lengths is None else ", one padding"
                yield operator_case(
                    *(name, f"{T} x {H} x {D}{padded}", dtype),
                    partial(_prepared, given, index),
                    partial(_exact_prepared, given, index),
                    SEVERAL_ROUNDINGS,
                )
        o, weight = at_random((1, T, H, D), mx.float32, 4), layer.o_norm.weight
        yield operator_case(
            *("kda_finish", f"{T} x {H} x {D}", dtype),
            partial(naive_kda_finish, o, f, weight, layer.o_norm.eps),
            partial(_exact_finish, o, f, weight, layer.o_norm.eps),
            SEVERAL_ROUNDINGS,
        )
        yield from _delta_rule(T, H, D)


def _prepared(given: Projected, index: int) -> mx.array:
    return naive_kda_prepare(given)[index]


def _exact_prepared(given: Projected, index: int) -> Float64:
    x, f, taps, tail = (numbers(part) for part in given[:4])
    A_log, dt_bias = numbers(given.A_log), numbers(given.dt_bias)
    (_, T, _), (H, D) = x.shape, dt_bias.shape
    valid = T if given.lengths is None else int(np.array(given.lengths)[0])
    window = np.concatenate([tail, x[..., : 3 * H * D]], axis=1)
    if index == 5:
        return window[:, valid : valid + len(taps) - 1]
    padding = np.arange(T)[None, :, None] >= valid
    if index == 4:
        return np.where(padding, 0, sigmoid(x[..., -H:]))
    if index == 3:
        softplus = np.logaddexp(0, f.reshape(1, T, H, D) + dt_bias)
        return np.where(padding[..., None], 1, np.exp(-np.exp(A_log)[:, None] * softplus))
    y = sum(window[:, tap : tap + T] * taps[tap] for tap in range(len(taps)))
    y = (y * sigmoid(y)).reshape(1, T, 3, H, D)[:, :, index]
    if index == 2:
        return np.asarray(y)
    return np.asarray(
        y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) * D ** -(0.5 * (index == 0))
    )


def _exact_finish(o: mx.array, g: mx.array, weight: mx.array, eps: float) -> Float64:
    y = numbers(o)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + eps) * numbers(weight)
    return np.asarray((y * sigmoid(numbers(g).reshape(y.shape))).reshape(g.shape))


def _delta_rule(T: int, H: int, D: int) -> Iterator[Case]:
    """Unit keys, decays of every strength."""
    q, k, v = (at_random((1, T, H, D), mx.float32, seed) * D**-0.5 for seed in (5, 6, 7))
    alpha = mx.exp(-mx.exp(2 * at_random((1, T, H, D), mx.float32, 8) - 2))
    beta = mx.sigmoid(at_random((1, T, H), mx.float32, 9))
    given = [q, k, v * D**0.5, alpha, beta, at_random((1, H, D, D), mx.float32, 10)]
    mx.eval(given)
    compute = naive_kda if T == 1 else kda_chunk
    for index, part in enumerate(("outputs", "state")):
        yield operator_case(
            *(f"{compute.__name__} ({part})", f"{T} x {H} x {D}", mx.float32),
            partial(result_of, compute, given, index),
            partial(_exact_delta_rule, given, index),
            SEVERAL_ROUNDINGS,
        )


def _exact_delta_rule(given: list[mx.array], index: int) -> Float64:
    q, k, v, alpha, beta, S = (numbers(x) for x in given)
    outputs = []
    for t in range(q.shape[1]):
        S = S * alpha[:, t, :, None, :]  # [B, H, Dv, Dk]
        delta = v[:, t, :, :, None] - S @ k[:, t, :, :, None]
        S = S + beta[:, t, :, None, None] * delta * k[:, t, :, None, :]
        outputs.append((S @ q[:, t, :, :, None])[..., 0])
    return np.stack(outputs, axis=1) if index == 0 else S
