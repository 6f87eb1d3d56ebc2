"""A layer's operators in MLX operations against float64: as MLX fuses them, on their layouts.

A single function that is right may still be wrong within a compiled graph, or on strides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.evaluation.mlx_ops.case import (
    SEVERAL_ROUNDINGS,
    TOKENS,
    Case,
    Expected,
    at_random,
    operator_case,
    result_of,
    tolerance_of,
)
from mlx_kimi.evaluation.mlx_ops.float64 import Float64, numbers, sigmoid
from mlx_kimi.evaluation.mlx_ops.kda import kda_cases
from mlx_kimi.evaluation.mlx_ops.products import product
from mlx_kimi.metal_kernels.attention import Block, attend
from mlx_kimi.metal_kernels.experts import naive_expert_combine, naive_expert_select
from mlx_kimi.model.kda import KimiDeltaAttention
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.layers import swiglu
from mlx_kimi.model.mla import MultiHeadLatentAttention
from mlx_kimi.model.moe import MixtureOfExperts

NEAR = 1e-4  # biased scores nearer than this may change places by rounding: not compared


def operator_cases(model: KimiLinear) -> Iterator[Case]:
    """Those of the first layer of each kind."""
    dtype = model.norm.weight.dtype
    modules = [module for _, module in reversed(model.named_modules())]
    for kind, cases in (
        (KimiDeltaAttention, kda_cases),
        (MultiHeadLatentAttention, _attention_cases),
        (MixtureOfExperts, _expert_cases),
    ):
        layer = next((module for module in modules if isinstance(module, kind)), None)
        if layer is not None:
            make: Callable[..., Iterator[Case]] = cases
            yield from make(layer, model.config, dtype)
    yield from _matmuls(model.config, dtype)


# --------------------------------------------------------------------------------------- products
def _matmuls(config: ModelConfig, dtype: mx.Dtype) -> Iterator[Case]:
    """Of activations: scores, weighed values, and a chunk of the delta rule with itself and states.

    Right sides are transposed views, as scores have them, or lie as they are multiplied.
    """
    H, D, Dk = config.num_attention_heads, config.kda_head_dim, config.latent_width
    heads = config.kda_num_heads
    for left, right, of in (
        *(((1, H, T, Dk), (1, 1, Dk, 257), mx.float32) for T in TOKENS),
        *(((1, H, T, 257), (1, 1, 257, Dk), dtype) for T in TOKENS),
        *(((3, heads, 16 // n, n, D), (3, heads, 16 // n, D, n // 2), mx.float32) for n in (2, 16)),
        ((1, heads, 32, D), (1, heads, D, D), mx.float32),
    ):
        x, y = at_random(left, of, 1), at_random(right, of, 2)
        turned = at_random((*right[:-2], *right[:-3:-1]), of, 3).swapaxes(-1, -2)
        for how, w in (("", y), (" transposed", turned)):
            shapes = " and ".join(" x ".join(map(str, part.shape)) for part in (x, w))
            run, expected = partial(mx.matmul, x, w), partial(_exact_product, x, w)
            yield Case("matmul", shapes + how, of, run, expected, tolerance_of(of))


def _exact_product(x: mx.array, y: mx.array) -> Expected:
    return Expected(*product(numbers(x), numbers(y).swapaxes(-1, -2)))


# -------------------------------------------------------------------------------------- attention
def _attention_cases(
    layer: MultiHeadLatentAttention, config: ModelConfig, dtype: mx.Dtype
) -> Iterator[Case]:
    """In latent space, where all heads share the keys, and over keys of each head."""
    H = layer.embed_q.weight.shape[0]
    lora, width, v = layer.lora, layer.width, layer.unembed_out.out_features
    for T in TOKENS:
        for heads, Dk, Dv in ((1, width, lora), (H, config.qk_head_dim, v)):
            queries = at_random((1, T, H, Dk), dtype, 1).transpose(0, 2, 1, 3)
            past = (64, 257)  # positions of two segments
            blocks, start = [], 0
            for seed, size in enumerate((*past, T)):
                keys = at_random((1, heads, size, max(Dk, Dv)), dtype, seed + 2)
                values = keys[..., :Dv] if heads == 1 else at_random((1, H, size, Dv), dtype, seed)
                blocks.append(Block(start, keys[..., :Dk], values))
                start += size
            scale = Dk**-0.5
            yield operator_case(
                *("attend", f"{H} heads, {T} x {start} x {Dk}, {heads} of keys", dtype),
                partial(attend, queries, blocks, scale, start - T),
                partial(_exact_attention, queries, blocks, scale, start - T),
                SEVERAL_ROUNDINGS,
            )


def _exact_attention(q: mx.array, blocks: list[Block], scale: float, first: int) -> Float64:
    keys = np.concatenate([numbers(block.keys) for block in blocks], axis=2)
    values = np.concatenate([numbers(block.values) for block in blocks], axis=2)
    scores = scale * numbers(q) @ keys.swapaxes(-1, -2)
    last = first + np.arange(q.shape[2])[:, None]
    scores = np.where(np.arange(keys.shape[2]) <= last, scores, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(probs / probs.sum(-1, keepdims=True) @ values)


# ---------------------------------------------------------------------------------------- experts
def _expert_cases(layer: MixtureOfExperts, config: ModelConfig, dtype: mx.Dtype) -> Iterator[Case]:
    router, k = layer.router, layer.router.top_k
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    rule = (k, router.groups, router.best_groups, router.renormalize, router.scale)
    for T in TOKENS:
        logits = at_random((T, router.gate.out_features), mx.float32, 1)
        for index, part in enumerate(("experts", "weights")):
            what = f"{T} x {k} of {logits.shape[1]}"
            given: list[Any] = [logits, router.e_score_correction_bias, *rule]
            yield Case(
                *(f"expert_select ({part})", what, mx.float32),
                partial(result_of, naive_expert_select, given, index),
                partial(_exact_selection, logits, router.e_score_correction_bias, rule, index),
                tolerance_of(mx.float32, product=False) * index,  # (experts are exact)
            )
        gate, up = (at_random((T, k, 1, inner), dtype, seed) for seed in (2, 3))
        yield operator_case(
            *("swiglu", f"{T} x {k} x {inner}", dtype),
            partial(swiglu, gate, up),
            partial(_exact_swiglu, gate, up),
            SEVERAL_ROUNDINGS,
        )
        y, shared = at_random((T * k, hidden), dtype, 4), at_random((T, hidden), dtype, 5)
        places = mx.array(np.random.default_rng(0).permutation(T * k).reshape(T, k), mx.uint32)
        weights = mx.abs(at_random((T, k), mx.float32, 6))
        yield operator_case(
            *("expert_combine", f"{T} x {k} x {hidden}", dtype),
            partial(naive_expert_combine, y, places, weights, shared),
            partial(_exact_combination, y, places, weights, shared),
            SEVERAL_ROUNDINGS,
        )


def _exact_selection(
    logits: mx.array, bias: mx.array, rule: tuple[int, int, int, bool, float], index: int
) -> Expected:
    """Of the tokens whose choice no rounding can change."""
    k, groups, best_groups, renormalize, scale = rule
    scores = sigmoid(numbers(logits))
    biased = scores + numbers(bias)
    clear = np.ones(len(biased), bool)
    if groups > 1:
        grouped = biased.reshape(len(biased), groups, -1)
        value = np.sort(grouped, axis=-1)[..., -2:].sum(-1)
        ranked = np.sort(value, axis=-1)[:, ::-1]
        if best_groups < groups:
            clear &= ranked[:, best_groups - 1] - ranked[:, best_groups] > NEAR
        kept = (value >= ranked[:, best_groups - 1 : best_groups])[..., None]
        biased = np.where(kept, grouped, -1e9).reshape(biased.shape)
    experts = np.argsort(-biased, axis=-1, kind="stable")
    best = np.take_along_axis(biased, experts, axis=-1)[:, : k + 1]
    clear &= (-np.diff(best, axis=-1) > NEAR).all(-1)
    experts = experts[:, :k]
    if index == 0:
        return Expected(experts[clear].astype(np.float64), 1.0, (clear,))
    weights = np.take_along_axis(scores, experts, axis=-1)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return Expected(scale * weights[clear], 1.0, (clear,))


def _exact_swiglu(gate: mx.array, up: mx.array) -> Float64:
    g = numbers(gate)
    return np.asarray(g * sigmoid(g) * numbers(up))


def _exact_combination(
    y: mx.array, places: mx.array, weights: mx.array, shared: mx.array
) -> Float64:
    parts = numbers(y)[np.array(places)] * numbers(weights)[..., None]
    return np.asarray(parts.sum(axis=-2) + numbers(shared))
