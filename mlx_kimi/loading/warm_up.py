"""Every kernel that a model launches, once, before anyone waits for an answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import mlx.core as mx

from mlx_kimi.metal_kernels.experts import expert_combine
from mlx_kimi.metal_kernels.kernel import refusals, trying
from mlx_kimi.metal_kernels.tuning import tuning
from mlx_kimi.model import mla
from mlx_kimi.model.cache import TAIL, KDACache, LatentCache
from mlx_kimi.model.forward_batch import ForwardBatch
from mlx_kimi.model.kda import KimiDeltaAttention
from mlx_kimi.model.kimi_linear import DecoderLayer, KimiLinear
from mlx_kimi.model.moe import MixtureOfExperts

LARGE_BATCH = 8  # texts, whose lengths are 8 elements
_log = logging.getLogger(__name__)


def warm_up(model: KimiLinear) -> dict[str, str]:
    """Compile the kernels of `model` for this GPU, and say which of them it cannot run.

    Their operators use MLX operations from then on. Layers of one kind launch the same kernels: one
    of each kind is run, on zeros. No expert is read from a file.

    Returns:
        The kernels that cannot run, with MLX's or the compiler's whole message. Each is a warning
        of the log, too, in one line.
    """
    kinds = {(type(layer.self_attn), type(layer.mlp)): layer for layer in model.layers}
    with model.choices.use(), trying() as refused:
        for layer in kinds.values():
            _attend(model, layer)
            _feed_forward(model, layer)
        mx.eval(model.norm.add_norm(*_zeros(model, 1)))
    for reason in refusals():
        _log.warning("%s; MLX operations take its place, slower", reason)
    return dict(refused)


def _zeros(model: KimiLinear, T: int, B: int = 1) -> tuple[mx.array, mx.array]:
    """x and residual of B texts of T tokens."""
    x = mx.zeros((B, T, model.config.hidden_size), model.norm.weight.dtype)
    return x, x


def _steps() -> tuple[int, ...]:
    """Tokens of one call after another: many, few, and one take different ways.

    (Two tokens of a tiny model are inputs of under 8 elements, in another address space: to Metal
    another kernel.)
    """
    return tuning().expand_from, tuning().chunked_from - 1, 2, 1


def _attend(model: KimiLinear, layer: DecoderLayer) -> None:
    attention = layer.self_attn
    if isinstance(attention, KimiDeltaAttention):
        _read(model, layer, KDACache(), _steps())
        for B in (1, LARGE_BATCH):  # padded: their lengths are an input
            _read(model, layer, KDACache(), (2,), ForwardBatch.padded([2] * B))
        return
    _read(model, layer, LatentCache(), _steps())
    _read(model, layer, LatentCache(bits=8), (TAIL, 1))  # packed once a tail is full
    # More than is expanded at a time: the outputs of each block are merged, and stay float32.
    long = LatentCache(lengths=(mla.EXPANDED // attention.embed_q.weight.shape[0],))
    long.append(mx.zeros((1, long.lengths[0], attention.width), model.norm.weight.dtype))
    _read(model, layer, long, (tuning().expand_from,))


def _read(
    model: KimiLinear,
    layer: DecoderLayer,
    cache: KDACache | LatentCache,
    steps: Sequence[int],
    batch: ForwardBatch | None = None,
) -> None:
    """Calls of so many tokens, one after another, of one text or of a padded batch."""
    batch = batch or ForwardBatch()
    B = 1 if batch.lengths is None else batch.lengths.size
    for T in steps:
        normed, _ = layer.input_layernorm.add_norm(*_zeros(model, T, B))
        mx.eval(layer.attend(normed, cache, batch), cache.arrays())
        cache.lengths = tuple(n + T for n in cache.lengths or (0,) * B)


def _feed_forward(model: KimiLinear, layer: DecoderLayer) -> None:
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    most = tuning().largest_batch
    for tokens in (1, most):
        x, residual = _zeros(model, tokens)
        if not isinstance(mlp, MixtureOfExperts):
            mx.eval(mlp.norm_and_forward(norm, x, residual, None))
            continue
        k = mlp.router.top_k
        if mlp.kernels.unsupported_reason(tokens) is None:
            normed, _, experts, weights = mlp.router.norm_and_route(norm, x[0], residual[0])
            mx.eval(mlp.kernels(normed, mx.zeros_like(experts), weights))
        y, places = mx.zeros((tokens * k, x.shape[-1]), x.dtype), mx.zeros((tokens, k), mx.int32)
        shared = None if mlp.shared_experts is None else x[0]
        mx.eval(expert_combine(y, places, mx.ones((tokens, k)), shared))
    if isinstance(mlp, MixtureOfExperts):
        mx.eval(mlp.router(_zeros(model, most + 1)[0]))
        _many_tokens(model, mlp)


def _many_tokens(model: KimiLinear, mlp: MixtureOfExperts) -> None:
    many, k, cache = mlp.many_tokens, mlp.router.top_k, mlp.expert_cache
    for tokens in many.first_tokens(k):
        if many.unsupported_reason(tokens, k) is not None:
            continue
        x, experts = _zeros(model, tokens)[0][0], mx.zeros((tokens, k), mx.int32)
        if cache is None or cache.holds_all:
            mx.eval(many(x, experts, mx.ones((tokens, k)), None))
            continue
        order = mx.arange(tokens * k, dtype=mx.int32)
        starts = mx.minimum(mx.arange(cache.slots + 1), 1) * order.size  # all are of slot 0
        mx.eval(many.wave(x, order, starts, k))
        if many.has_shared(tokens, k):
            mx.eval(many.shared_alone(x, k))
