"""The kernels at the 48B's full size on the GPU at hand: are they right, and how long do they take?

    .venv/bin/python -m benchmarks.kernels check
    .venv/bin/python -m benchmarks.kernels time

`check` compares every operator with its naive form and with float64, and a whole model with kernels
on and off on forced tokens. `time` runs ours, mlx-lm's and, where they are installed, FLA's kernels
in turns; a figure is the median over repeats, of calls one after another that, where they are
short, each need the last one's result, so that the time to submit a call hides behind the one that
runs. Steps of one token go through `mx.compile`, ours and the ops form alike: building a graph
would take longer than it runs.
"""

from __future__ import annotations

import os

os.environ["MLX_ENABLE_TF32"] = "0"

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.full_size import CONFIG, peer_kernels
from benchmarks.launches import launches
from mlx_kimi.bundled import pocket_folder
from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.evaluation.random_model import model_of, random_arrays
from mlx_kimi.loading.command_buffers import enlarge_command_buffers
from mlx_kimi.loading.load import load_model
from mlx_kimi.metal_kernels.add_norm import add_norm_kernel, naive_add_norm
from mlx_kimi.metal_kernels.attention import Block, attend
from mlx_kimi.metal_kernels.experts import (
    SwiGLUWeights,
    add_norm_scores,
    expert_combine,
    expert_mlp,
    expert_select,
    naive_expert_select,
)
from mlx_kimi.metal_kernels.kda_chunk import kda_chunk_kernel
from mlx_kimi.metal_kernels.kda_decode import DecodeWeights, kda_decode, naive_kda_decode
from mlx_kimi.metal_kernels.kda_sequential import kda_sequential_kernel
from mlx_kimi.metal_kernels.kernel import backend, use_backend
from mlx_kimi.metal_kernels.latents import pack
from mlx_kimi.metal_kernels.matrix import Matrix
from mlx_kimi.metal_kernels.mla_decode import LatentWeights, mla_decode, naive_mla_decode
from mlx_kimi.metal_kernels.mla_prefill import Expanded, mla_prefill, naive_mla_prefill
from mlx_kimi.metal_kernels.sorted_experts import sorted_experts
from mlx_kimi.metal_kernels.split_kv import SplitKVPlan
from mlx_kimi.metal_kernels.tuning import ExpertForm
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.text.tokenizer import load_tokenizer
from tests.assertions import largest_error, rms_error
from tests.kda_cases import GATES, Inputs, case, recurrence

H, D, HIDDEN, INNER, EXPERTS, TOP_K = 32, 128, 2304, 1024, 256, 8
Tolerance = tuple[float, float]  # rms, largest
FLOAT32: Tolerance = (5e-6, 2e-5)
FLOAT16_STAGE: Tolerance = (4e-3, 8e-3)
ONE_BFLOAT16: Tolerance = (2.5e-3, 4e-3)  # one rounding of the output
TWO_BFLOAT16: Tolerance = (3.6e-3, 8e-3)  # and one of what lies between two kernels
THREE_BFLOAT16: Tolerance = (5e-3, 1.2e-2)  # and of the weights, where matrix units take them so
LOGITS = 4e-2  # of a token's largest: bfloat16, rounded at other places in each layer
SPLIT = 1e-4  # of the largest: the same numbers in float32, added in another order
PROMPT = 192  # tokens before those that are forced one by one: enough for mla_prefill
Rule = Callable[..., tuple[mx.array, mx.array]]


# ------------------------------------------------------------------------------------- right?
def check(tokens: int) -> int:
    """How many comparisons failed."""
    failed = 0
    found = chain(
        *(_models(), _sums(), _decode(), _latents(), _prefill(), _experts(), _many_experts()),
        *(_delta_rules(tokens), _delta_rules(101)),
    )
    for name, errors, tolerance in found:
        right = all(e <= t for e, t in zip(errors, tolerance, strict=True))
        failed += not right
        shown = ", ".join(f"{e:.1e} (of {t:.0e})" for e, t in zip(errors, tolerance, strict=True))
        print(f"{'ok    ' if right else 'FAILED'} {name:<52} {shown}", flush=True)
    return failed


Comparisons = Iterator[tuple[str, tuple[float, ...], tuple[float, ...]]]


def _delta_rules(T: int) -> Comparisons:
    """Against float64, all cases of gates at once: each has a few of the heads."""
    heads = [H // len(GATES) + (i < H % len(GATES)) for i in range(len(GATES))]
    cases = [case(gate, T=T, H=h, Dk=D) for gate, h in zip(GATES, heads, strict=True)]
    joined = Inputs(
        *(np.concatenate(x, axis=2) for x in list(zip(*cases, strict=True))[:5]),
        np.concatenate([x.state for x in cases], axis=1),
    )
    # The oracle is given the decays that the kernels are: each was rounded to float32 once, which,
    # over thousands of tokens that are remembered, is more than all of the arithmetic.
    alpha = np.array(joined.arrays()[3]).astype(np.float64)
    with np.errstate(divide="ignore"):
        joined = joined._replace(log_alpha=np.log(alpha))
    oracle = recurrence(joined)
    owners = np.repeat(np.arange(len(GATES)), heads)
    for form, rule, tolerance in (
        ("kda_sequential", kda_sequential_kernel, FLOAT32),
        ("kda_chunk", kda_chunk_kernel, FLOAT32),
        ("kda_chunk, staged in float16", _staged, FLOAT16_STAGE),
    ):
        o, state = (np.array(x) for x in rule(*joined.arrays()))
        for i, gate in enumerate(GATES):
            own = owners == i
            parts = ((o[:, :, own], oracle[0][:, :, own]), (state[:, own], oracle[1][:, own]))
            yield (
                f"{form}, T = {T}, {gate}",
                (max(rms_error(*p) for p in parts), max(largest_error(*p) for p in parts)),
                tolerance,
            )
    arrays = joined.arrays()
    cut = T // 32 * 16
    whole, end = kda_chunk_kernel(*arrays)
    first, state = kda_chunk_kernel(*(x[:, :cut] for x in arrays[:5]), arrays[5])
    second, state = kda_chunk_kernel(*(x[:, cut:] for x in arrays[:5]), state)
    same = mx.array_equal(mx.concatenate([first, second], axis=1), whole) & mx.array_equal(
        state, end
    )
    yield "kda_chunk, two calls are one, bit for bit", (float(not same.item()),), (0.0,)


def _staged(*arrays: mx.array) -> tuple[mx.array, mx.array]:
    return kda_chunk_kernel(*arrays, stage=mx.float16)


def _decode() -> Comparisons:
    for dtype, bits, tolerance in (
        (mx.float32, 4, FLOAT32),
        (mx.float32, 0, FLOAT32),
        (mx.bfloat16, 4, ONE_BFLOAT16),
    ):
        x, weights, tail, state = _decode_inputs(dtype, bits)
        ours = kda_decode(x, weights, tail, state)
        exact = _in_float32(weights)
        expected = naive_kda_decode(
            *(y.astype(mx.float32) for y in (x,)), exact, tail.astype(mx.float32), state
        )
        errors = [
            (rms_error(a, b), largest_error(a, b)) for a, b in zip(ours, expected, strict=True)
        ]
        worst = tuple(max(column) for column in zip(*errors, strict=True))
        yield f"kda_decode, {_name(dtype)}, {bits or 16} bits", worst, tolerance


def _sums() -> Comparisons:
    for dtype, tolerance in ((mx.float32, FLOAT32), (mx.bfloat16, ONE_BFLOAT16)):
        x, part, weight = (
            mx.random.normal(shape).astype(dtype) for shape in ((3, HIDDEN), (3, HIDDEN), (HIDDEN,))
        )
        total, normed = add_norm_kernel(x, part, weight, 1e-5)
        _, expected = naive_add_norm(
            total.astype(mx.float32), mx.zeros_like(x), weight.astype(mx.float32), 1e-5
        )
        same = mx.array_equal(total, x + part).item()
        errors = (rms_error(normed, expected), largest_error(normed, expected))
        yield f"add_norm, {_name(dtype)}", (float(not same), *errors), (0.0, *tolerance)


def _latents() -> Comparisons:
    """One token of an MLA layer, after thousands."""
    nope, shared, lora, room = 128, 64, 512, 256
    width = lora + shared
    for dtype, bits, packed, sizes, tolerance in (
        (mx.float32, 0, False, (4096, 2048, 256), FLOAT32),
        (mx.bfloat16, 4, False, (16384, 2048, 256), ONE_BFLOAT16),
        (mx.bfloat16, 4, True, (16384, 2048, 256), ONE_BFLOAT16),
        (mx.bfloat16, 8, False, (), ONE_BFLOAT16),
    ):
        mx.random.seed(7)
        weights = LatentWeights(
            _matrix((H, lora, nope), bits, dtype),
            _matrix((H, D, lora), bits, dtype),
            mx.ones((lora,), dtype),
            1e-6,
            2 * width**-0.5,
        )
        x = mx.random.normal((1, H * (nope + shared) + width)).astype(dtype)
        tail = mx.random.normal((1, room, width)).astype(dtype)
        segments = [mx.random.normal((1, n, width)).astype(dtype) for n in sizes]
        segments = [pack(s) for s in segments] if packed else segments
        y, _ = mla_decode(x, weights, tail, SplitKVPlan.uniform(100, room, sizes), segments)
        plain = weights._replace(
            embed_q=Matrix(_dequantized(weights.embed_q)),
            unembed_out=Matrix(_dequantized(weights.unembed_out)),
        )
        # (It attends to the new latent unrounded: one of thousands.)
        wide = [s if packed else s.astype(mx.float32) for s in segments]
        expected, _ = naive_mla_decode(
            x.astype(mx.float32), plain, tail.astype(mx.float32), 100, wide
        )
        name = f"mla, {_name(dtype)}, {bits or 16} bits, {'packed' if packed else 'plain'} latents"
        yield name, (rms_error(y, expected), largest_error(y, expected)), tolerance


def _prefill() -> Comparisons:
    """Many tokens' attention to blocks among and before them."""
    for dtype, T, S, offset, tolerance in (
        (mx.float32, 500, 700, 200, FLOAT32),
        (mx.float32, 500, 700, 700, FLOAT32),
        (mx.bfloat16, 2048, 2048, 0, TWO_BFLOAT16),
    ):
        arrays = _prefill_inputs(dtype, T, S)
        ours = mla_prefill(Expanded(*arrays, 2 * 192**-0.5, offset), dtype)
        wide = [x.astype(mx.float32) for x in arrays]
        expected = naive_mla_prefill(Expanded(*wide, 2 * 192**-0.5, offset), mx.float32)
        errors = [
            (rms_error(a, b), largest_error(a, b)) for a, b in zip(ours, expected, strict=True)
        ]
        worst = tuple(max(column) for column in zip(*errors, strict=True))
        yield f"mla_prefill, {_name(dtype)}, {T} tokens, {S} columns", worst, tolerance


def _in_float32(weights: DecodeWeights) -> DecodeWeights:
    def plain(matrix: Matrix) -> Matrix:
        return Matrix(_dequantized(matrix))

    return DecodeWeights(
        weights.taps.astype(mx.float32),
        plain(weights.f_b),
        plain(weights.g_b),
        weights.A_log,
        weights.dt_bias,
        weights.norm.astype(mx.float32),
        weights.eps,
    )


def _experts() -> Comparisons:
    for dtype, bits, B, tolerance in (
        (mx.float32, 4, 1, FLOAT32),
        (mx.bfloat16, 4, 1, TWO_BFLOAT16),
        (mx.bfloat16, 8, 8, TWO_BFLOAT16),
        (mx.bfloat16, 0, 3, TWO_BFLOAT16),
    ):
        x, logits, bias, routed, shared = _expert_inputs(dtype, bits, B)
        router = mx.random.normal((EXPERTS, HIDDEN)) * HIDDEN**-0.5
        weight = mx.ones((HIDDEN,), dtype)
        _, normed, scores = add_norm_scores(x, x, weight, 1e-5, Matrix(router))
        expected = normed.astype(mx.float32) @ router.T
        errors = (rms_error(scores, expected), largest_error(scores, expected))
        yield f"add_norm_scores, {_name(dtype)}, B = {B}", errors, FLOAT32
        how = (TOP_K, 1, 1, True, 2.446)
        experts, weights = expert_select(logits, bias, *how)
        expected_experts, expected = naive_expert_select(logits, bias, *how)
        chosen = float(not mx.array_equal(experts, expected_experts).item())
        yield (
            f"expert_select, B = {B}",
            (chosen, largest_error(weights, expected)),
            (0.0, 1e-6),
        )
        y = expert_mlp(x, experts, weights, routed, shared)
        expected = _plain_experts(x, experts, weights, routed, shared)
        yield (
            f"expert_gate_up, expert_down, {_name(dtype)}, {bits or 16} bits, B = {B}",
            (rms_error(y, expected), largest_error(y, expected)),
            tolerance,
        )


def _many_experts() -> Comparisons:
    """40 tokens in each form, in every stored format."""
    forms = (ExpertForm(0, "vectors"), *(ExpertForm(0, "tiles", tiles) for tiles in (1, 2, 4)))
    for dtype, bits, group, mode, tolerance in (
        (mx.float32, 4, 64, "affine", FLOAT32),
        *((mx.bfloat16, bits, 64, "affine", THREE_BFLOAT16) for bits in (0, 2, 3, 4, 5, 6, 8)),
        (mx.bfloat16, 4, 32, "mxfp4", THREE_BFLOAT16),
        (mx.bfloat16, 4, 16, "nvfp4", THREE_BFLOAT16),
        (mx.bfloat16, 8, 32, "mxfp8", THREE_BFLOAT16),
    ):
        wide, narrow = (INNER, HIDDEN), (HIDDEN, INNER)
        routed, shared = (
            SwiGLUWeights(
                *(
                    _matrix((*stack, *shape), bits, dtype, group, mode)
                    for shape in (wide, wide, narrow)
                )
            )
            for stack in ((16,), ())
        )
        x = mx.random.normal((40, HIDDEN)).astype(dtype)
        experts = mx.argsort(mx.random.uniform(shape=(40, 16)), axis=-1)[:, :TOP_K].astype(mx.int32)
        weights = mx.random.uniform(shape=(40, TOP_K)) / TOP_K
        expected = _plain_experts(x, experts, weights, routed, shared)
        for form in forms:
            y, places = sorted_experts(x, experts, routed, shared, form)
            y = expert_combine(y, places, weights, y[experts.size :])
            yield (
                f"experts of 40 tokens, {_name(dtype)}, {mode} {bits or 16} bits, {form.kernels}"
                f"{f' {form.tiles}' if form.tiles else ''}",
                (rms_error(y, expected), largest_error(y, expected)),
                tolerance,
            )


def _plain_experts(
    x: mx.array, experts: mx.array, weights: mx.array, routed: SwiGLUWeights, shared: SwiGLUWeights
) -> mx.array:
    """In float32, one expert after another."""
    x = x.astype(mx.float32)

    def mlp(row: mx.array, expert: int | None, which: SwiGLUWeights) -> mx.array:
        gate, up, down = (
            _dequantized(m if expert is None else _expert(m, expert))
            for m in (which.gate, which.up, which.down)
        )
        g = row @ gate.T
        return (g * mx.sigmoid(g) * (row @ up.T)) @ down.T

    rows = []
    for row, chosen, share in zip(x, experts.tolist(), weights, strict=True):
        parts = [w * mlp(row, e, routed) for e, w in zip(chosen, share, strict=True)]
        rows.append(sum(parts) + mlp(row, None, shared))
    return mx.stack(rows)


def _expert(stack: Matrix, expert: int) -> Matrix:
    return Matrix(*(None if part is None else part[expert] for part in stack[:3]), *stack[3:])


def _dequantized(matrix: Matrix) -> mx.array:
    if not matrix.bits:
        return matrix.weight.astype(mx.float32)
    w, scales, biases, group_size, bits, mode = matrix
    if mode != "affine":  # exact: a small float times a power of two, or another
        return mx.dequantize(w, scales, None, group_size, bits, mode).astype(mx.float32)
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(w, scales, biases, group_size, bits)


def _models() -> Comparisons:
    """64 forced tokens after a prompt, with kernels against MLX operations.

    The step of one token as a compiled graph, and layer by layer.
    """
    # Random routers choose between experts that are almost equally good, so that a rounding to 16
    # bits can change an expert, and with it the whole answer. In float32 it cannot.
    arrays = random_arrays(ModelConfig.from_json(CONFIG), mx.float32)
    ids = mx.random.randint(0, CONFIG["vocab_size"], (1, PROMPT + 64), key=mx.random.key(3))
    for how, ours, expected in _forced(model_of(CONFIG, arrays), ids):
        error = largest_error(ours, expected)
        best = mx.sort(expected, axis=-1)[..., -2:]
        decided = best[..., 1] - best[..., 0] > 2 * error * mx.abs(expected).max()
        wrong = decided & (mx.argmax(ours, axis=-1) != mx.argmax(expected, axis=-1))
        left_out = 1 - float(decided.astype(mx.float32).mean())
        name = f"48B shape, float32, 64 forced tokens, {how}"
        yield name, (error, float(wrong.sum()), left_out), (SPLIT, 0.0, 0.1)
    del arrays
    # A trained router is surer, on text that it knows: the median token, and the share of tokens
    # whose likeliest successor is another, tell of 16 bits.
    tokenizer = load_tokenizer(pocket_folder())
    text = "Reverse these words: " + " ".join(["apple", "river", "stone", "cloud"] * 64)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    ids = mx.array([ids[: PROMPT + 64]])
    for how, ours, expected in _forced(load_model(pocket_folder()), ids):
        errors = mx.abs(ours - expected).max(axis=-1) / mx.abs(expected).max(axis=-1)
        others = mx.argmax(ours, axis=-1) != mx.argmax(expected, axis=-1)
        name = f"pocket model, bfloat16, {ids.size - PROMPT} forced tokens, {how}"
        found = float(mx.sort(errors.flatten())[errors.size // 2]), float(others.mean())
        yield name, found, (LOGITS, 0.1)


def _forced(model: KimiLinear, ids: mx.array) -> Iterator[tuple[str, mx.array, mx.array]]:
    """How the step ran, its logits, and those of MLX operations."""
    with use_backend(None):
        expected = _one_by_one(model, ids)
    for how, traced in {"compiled": True, "layer by layer": False}.items():
        with use_backend(backend(), traced):
            yield how, _one_by_one(model, ids), expected


def _one_by_one(model: KimiLinear, ids: mx.array, prompt: int = PROMPT) -> mx.array:
    cache = model.make_cache()
    logits = [model(ids[:, :prompt], cache)[:, -1:]]
    for t in range(prompt, ids.shape[1]):
        logits.append(model(ids[:, t : t + 1], cache))
        mx.eval(logits[-1])
    return mx.concatenate(logits, axis=1).astype(mx.float32)


# ------------------------------------------------------------------------------------- inputs
def _matrix(
    shape: tuple[int, ...], bits: int, dtype: mx.Dtype, group: int = 64, mode: str = "affine"
) -> Matrix:
    w = (mx.random.normal(shape) * shape[-1] ** -0.5).astype(dtype)
    if not bits:
        return Matrix(w)
    weight, scales, *biases = mx.quantize(w, group, bits, mode)
    return Matrix(weight, scales, *biases or [None], group, bits, mode)


def _decode_inputs(
    dtype: mx.Dtype, bits: int
) -> tuple[mx.array, DecodeWeights, mx.array, mx.array]:
    mx.random.seed(5)
    weights = DecodeWeights(
        (mx.random.normal((4, 3 * H * D)) * 0.5).astype(dtype),
        _matrix((H * D, D), bits, dtype),
        _matrix((H * D, D), bits, dtype),
        mx.log(mx.random.uniform(1, 16, (H,))),
        mx.random.uniform(-7, -2, (H, D)),
        mx.ones((D,), dtype),
        1e-5,
    )
    x = mx.random.normal((1, 3 * H * D + 2 * D + H)).astype(dtype)
    tail = mx.random.normal((1, 3, 3 * H * D)).astype(dtype)
    state = mx.random.normal((1, H, D, D)) * 0.1
    mx.eval(x, tail, state, [w for part in weights[:3] for w in _arrays(part)], weights[3:6])
    return x, weights, tail, state


def _prefill_inputs(dtype: mx.Dtype, T: int, S: int) -> list[mx.array]:
    """x, keys, latents and values."""
    mx.random.seed(8)
    nope, shared, lora = 128, 64, 512
    shapes = [
        (1, T, H * (nope + shared) + lora + shared),
        (1, H, S, nope),
        (1, S, lora + shared),
        (1, H, S, D),
    ]
    return [mx.random.normal(shape).astype(dtype) for shape in shapes]


def _expert_inputs(
    dtype: mx.Dtype, bits: int, B: int
) -> tuple[mx.array, mx.array, mx.array, SwiGLUWeights, SwiGLUWeights]:
    mx.random.seed(6)

    def gated(*stack: int) -> SwiGLUWeights:
        wide, narrow = (*stack, INNER, HIDDEN), (*stack, HIDDEN, INNER)
        return SwiGLUWeights(*(_matrix(shape, bits, dtype) for shape in (wide, wide, narrow)))

    x = mx.random.normal((B, HIDDEN)).astype(dtype)
    logits, bias = mx.random.normal((B, EXPERTS)), mx.random.normal((EXPERTS,)) * 0.01
    routed, shared = gated(EXPERTS), gated()
    mx.eval(x, logits, bias, [_arrays(m) for mlp in (routed, shared) for m in vars(mlp).values()])
    return x, logits, bias, routed, shared


def _arrays(matrix: mx.array | Matrix) -> list[mx.array]:
    return [matrix] if isinstance(matrix, mx.array) else matrix.buffers()


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


# ------------------------------------------------------------------------------------- fast?
def times(repeats: int) -> None:
    for T in (128, 512, 2048, 8192):
        _print(f"delta rule, T = {T}", in_turns(_delta_rule_runs(T), repeats), "mlx-lm")
    _print("attention of 2048 tokens to themselves", in_turns(_prefill_runs(2048), repeats), "ops")
    runs, counts = _decode_runs()
    _print("a KDA layer's step of one token", in_turns(runs, repeats), "ops")
    print(f"  launches: {counts}")
    _print("routed and shared experts of one token", in_turns(_expert_runs(), repeats), "ops")


Chain = Callable[[int], None]  # runs so many calls, each after the last


def _delta_rule_runs(T: int) -> dict[str, Chain]:
    mx.random.seed(0)
    q, k, v = (mx.random.normal((1, T, H, D)) for _ in range(3))
    q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    q, k, v = ((x * s).astype(mx.bfloat16) for x, s in ((q, D**-0.5), (k, 1), (v, 1)))
    alpha, beta = mx.random.uniform(0.9, 1, (1, T, H, D)), mx.random.uniform(shape=(1, T, H))
    state = mx.zeros((1, H, D, D))
    mx.eval(q, k, v, alpha, beta, state)

    def chained(rule: Rule) -> Chain:
        def run(calls: int) -> None:
            S = state
            for _ in range(calls):
                _, S = rule(q, k, v, alpha, beta, S)
            mx.eval(S)

        return run

    runs = {
        "kda_chunk": chained(kda_chunk_kernel),
        "kda_sequential": chained(kda_sequential_kernel),
    }
    with peer_kernels():
        from mlx_lm.models.gated_delta import gated_delta_kernel

        peer = gated_delta_kernel
    runs["mlx-lm"] = chained(lambda *a: peer(*a[:4], a[4].astype(mx.bfloat16), a[5]))
    return runs | _fla_runs(q, k, v, alpha, beta)


def _fla_runs(*inputs: mx.array) -> dict[str, Chain]:
    """FLA's Triton kernel, where it and a GPU that it knows are."""
    try:
        import torch
        from fla.ops.kda import chunk_kda
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    q, k, v, alpha, beta = (torch.from_numpy(np.array(x.astype(mx.float32))).cuda() for x in inputs)
    q, k, v, beta = (x.bfloat16() for x in (q * D**0.5, k, v, beta))
    g = alpha.log()

    @torch.no_grad()
    def run(calls: int) -> None:
        S = None
        for _ in range(calls):
            _, S = chunk_kda(q, k, v, g, beta, initial_state=S, output_final_state=True)
        torch.cuda.synchronize()

    return {"FLA chunk_kda": run}


def _prefill_runs(T: int) -> dict[str, Chain]:
    x, keys, latents, values = _prefill_inputs(mx.bfloat16, T, T)
    q = x[..., : H * 192].reshape(1, T, H, 192).swapaxes(1, 2)
    shared = mx.broadcast_to(latents[:, None, :, -64:], (1, H, T, 64))
    block, scale = mx.concatenate([keys, shared], axis=-1), 192**-0.5
    mx.eval(x, q, keys, latents, values, block)

    def ops() -> mx.array:
        cut = [slice(i, i + 1024) for i in range(0, T, 1024)]
        blocks = (Block(c.start, block[:, :, c], values[:, :, c], None) for c in cut)
        return attend(q, blocks, scale, 0)

    def mlx_own() -> mx.array:
        sdpa = mx.fast.scaled_dot_product_attention
        return sdpa(q, block, values, scale=scale, mask="causal")

    def repeated(attention: Callable[[], Any]) -> Chain:
        def run(calls: int) -> None:
            for _ in range(calls):
                mx.async_eval(attention())
            mx.synchronize()

        return run

    given = Expanded(x, keys, latents, values, scale, 0)
    return {
        "mla_prefill": repeated(lambda: mla_prefill(given, x.dtype)),
        "ops": repeated(ops),
        "MLX's own": repeated(mlx_own),
    }


def _decode_runs() -> tuple[dict[str, Chain], str]:
    x, weights, tail, state = _decode_inputs(mx.bfloat16, 4)

    def chained(step: Callable[..., tuple[mx.array, ...]]) -> Chain:
        compiled = mx.compile(lambda window, S: step(x, weights, window, S))

        def run(calls: int) -> None:
            window, S = tail, state
            for _ in range(calls):
                _, window, S = compiled(window, S)
            mx.eval(window, S)

        return run

    def count(step: Callable[..., tuple[mx.array, ...]]) -> int:
        return sum(launches(*step(x, weights, tail, state)).values())

    return (
        {"kda_decode": chained(kda_decode), "ops": chained(naive_kda_decode)},
        f"kda_decode {count(kda_decode)}, ops {count(naive_kda_decode)}",
    )


def _expert_runs() -> dict[str, Chain]:
    x, logits, bias, routed, shared = _expert_inputs(mx.bfloat16, 4, 1)
    experts, weights = expert_select(logits, bias, TOP_K, 1, 1, True, 2.446)
    mx.eval(experts, weights)

    def ops(x: mx.array) -> mx.array:
        def gather(x: mx.array, m: Matrix) -> mx.array:
            return mx.gather_qmm(
                x,
                m.weight,
                m.scales,
                m.biases,
                rhs_indices=experts,
                transpose=True,
                group_size=64,
                bits=4,
            )

        def dense(x: mx.array, m: Matrix) -> mx.array:
            return mx.quantized_matmul(x, m.weight, m.scales, m.biases, True, 64, 4)

        rows = x[:, None, None]
        g, u = gather(rows, routed.gate), gather(rows, routed.up)
        y = gather(g * mx.sigmoid(g) * u, routed.down)[:, :, 0]
        y = (y * weights[..., None]).sum(axis=1).astype(x.dtype)
        g, u = dense(x, shared.gate), dense(x, shared.up)
        return y + dense(g * mx.sigmoid(g) * u, shared.down)

    def chained(step: Callable[[mx.array], mx.array]) -> Chain:
        compiled = mx.compile(step)

        def run(calls: int) -> None:
            y = x
            for _ in range(calls):
                y = compiled(y)
            mx.eval(y)

        return run

    return {
        "expert pair": chained(lambda x: expert_mlp(x, experts, weights, routed, shared)),
        "ops": chained(ops),
    }


CALLS = 16  # of a chain; more where a call is short


def in_turns(runs: dict[str, Chain], repeats: int) -> dict[str, list[float]]:
    """Seconds a call of each repeat, the runs taken in turns so that all meet the same machine."""
    for run in runs.values():
        run(2)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run(CALLS)
            found[name].append((time.perf_counter() - start) / CALLS)
    return found


def _print(what: str, found: dict[str, list[float]], baseline: str) -> None:
    base = statistics.median(found[baseline])
    print(what)
    for name, seconds in found.items():
        median = statistics.median(seconds)
        spread = (max(seconds) - min(seconds)) / median
        print(
            f"  {name:<16} {median * 1e3:9.3f} ms   {base / median:6.2f} x {baseline}   "
            f"(spread {spread:.0%})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("--tokens", type=int, default=4096, help="of the delta rule in check")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    enlarge_command_buffers()
    machine: Any = mx.device_info() if hasattr(mx, "device_info") else mx.default_device()
    print(f"mlx {mx.__version__} on {machine}")
    if options.what == "check":
        sys.exit(check(options.tokens))
    times(options.repeats)


if __name__ == "__main__":
    main()
