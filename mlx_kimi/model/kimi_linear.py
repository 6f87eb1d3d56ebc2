"""Kimi Linear: embed, then blocks of (KDA or MLA) and (MoE or MLP), then norm and lm_head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from threading import Lock
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from mlx_kimi.checkpoint.config import Layer, ModelConfig
from mlx_kimi.metal_kernels.attention import SubmitLimit
from mlx_kimi.model.cache import CacheEntry, KDACache, LatentCache
from mlx_kimi.model.compiled import CompiledStep
from mlx_kimi.model.kda import KimiDeltaAttention
from mlx_kimi.model.layers import MLP, RMSNorm
from mlx_kimi.model.mla import MultiHeadLatentAttention
from mlx_kimi.model.moe import MixtureOfExperts
from mlx_kimi.model.step import ForwardBatch
from mlx_kimi.model.weights import Weights

if TYPE_CHECKING:
    from mlx_kimi.offload.offload import ExpertOffload

# Tokens from which half a layer is submitted as soon as it is built: the device works while the
# host builds the next half. Up to some tokens of context two halves may be submitted, and hold what
# they need for their work; beyond, where latents take more, one.
SUBMITTED_FROM = 128
ONE_BY_ONE_FROM = 16_384


class DecoderLayer(nn.Module):
    """h = x + Attention(RMSNorm(x));  y = h + FeedForward(RMSNorm(h))."""

    def __init__(self, config: ModelConfig, layer: Layer, weights: Weights) -> None:
        super().__init__()
        eps = config.rms_norm_eps
        attention, mlp = weights.at("self_attn"), weights.at("mlp")
        self.input_layernorm = RMSNorm(weights.array("input_layernorm.weight"), eps)
        self.post_attention_layernorm = RMSNorm(
            weights.array("post_attention_layernorm.weight"), eps
        )
        self.self_attn: KimiDeltaAttention | MultiHeadLatentAttention = (
            KimiDeltaAttention(config, attention)
            if layer.attention == "kda"
            else MultiHeadLatentAttention(config, attention)
        )
        self.mlp: MixtureOfExperts | MLP = (
            MixtureOfExperts(config, mlp) if layer.feed_forward == "moe" else MLP(mlp)
        )

    def attend(self, normed: mx.array, entry: CacheEntry, step: ForwardBatch) -> mx.array:
        """With a slice of the heads, its part of the sum over slices."""
        if isinstance(self.self_attn, KimiDeltaAttention):
            assert isinstance(entry, KDACache)
            return self.self_attn(normed, entry, step.lengths)
        assert isinstance(entry, LatentCache)
        return self.self_attn(normed, entry, step.real, step.plan, step.ahead)

    def __call__(
        self,
        x: mx.array,
        part: mx.array | None,
        entry: CacheEntry,
        step: ForwardBatch,
        reduce: Callable[[mx.array], mx.array],
    ) -> tuple[mx.array, mx.array]:
        """The residual stream x, and the part that the layer before adds to it -> the same of y.

        A sum is made where it is normalised, so that both take one launch.
        """
        return self.fed_forward(*self.attended(x, part, entry, step, reduce), reduce)

    def attended(
        self,
        x: mx.array,
        part: mx.array | None,
        entry: CacheEntry,
        step: ForwardBatch,
        reduce: Callable[[mx.array], mx.array],
    ) -> tuple[mx.array, mx.array]:
        """The first half of a call: the same of h. `entry` moves on."""
        x, normed = self.input_layernorm.of_sum(x, part)
        part = reduce(self.attend(normed, entry, step))
        step.submit(x, part, *entry.arrays())  # (which would keep what they are made of alive)
        return x, part

    def fed_forward(
        self, x: mx.array, part: mx.array, reduce: Callable[[mx.array], mx.array]
    ) -> tuple[mx.array, mx.array]:
        """The second half of a call: the same of h -> the same of y."""
        x, part = self.mlp.after(self.post_attention_layernorm, x, part)
        return x, reduce(part)


class KimiLinear(nn.Module):
    """The model of one folder. Heads and experts are counted from the weights it is given.

    Several threads may use it, each with a cache of its own: they take turns, a step each.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        reduce: Callable[[mx.array], mx.array] = lambda part: part,
        offload: ExpertOffload | None = None,
    ) -> None:
        """`reduce` adds up the parts of a layer's output over the ranks of a sharded model.

        `offload` fills the banks that `weights` names; None: there are none.
        """
        super().__init__()
        self.config = config
        self.offload = offload
        self.reduce = reduce
        self.embed_tokens = weights.linear("model.embed_tokens")
        self.layers = [
            DecoderLayer(config, layer, weights.at(f"model.layers.{number}"))
            for number, layer in enumerate(config.layers)
        ]
        self.norm = RMSNorm(weights.array("model.norm.weight"), config.rms_norm_eps)
        self.lm_head = (
            self.embed_tokens if config.tie_word_embeddings else weights.linear("lm_head")
        )
        self.compiled = CompiledStep(self)
        self._turn = Lock()

    def __call__(
        self,
        ids: mx.array,
        cache: list[CacheEntry] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> mx.array:
        """ids [B, T] -> logits [B, T, vocab]; `cache` moves on by these tokens.

        Args:
            cache: from `make_cache`; None reads the tokens from nothing.
            lengths: [B], how many tokens of each row are real; the rest is padding on the right,
                whose logits mean nothing. None: all T.
        """
        return self.logits(self.hidden(ids, cache, lengths))

    def hidden(
        self,
        ids: mx.array,
        cache: list[CacheEntry] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> mx.array:
        """Like a call, but up to the last norm: ids [B, T] -> [B, T, hidden]."""
        B, T = ids.shape
        real = [T] * B if lengths is None else [int(length) for length in lengths]
        cache = self.make_cache() if cache is None else cache
        with self._turn:
            if min(real) < T:
                x = self.run(ids, cache, ForwardBatch.padded(T, real))
            elif T == 1 and self.compiled.takes(cache):
                x = self.compiled(ids, cache)
            else:
                x = self.run(ids, cache, ForwardBatch())
            self._finish(x)
            _count(cache, real)
        return x

    def advance(self, ids: mx.array, cache: list[CacheEntry]) -> None:
        """Move `cache` on by ids [B, T], whose output nobody wants.

        All ends with the last layer's attention: experts after it would be read for nothing.
        """
        with self._turn:
            self._finish(*self._attended(ids, cache, ForwardBatch()))
            _count(cache, [ids.shape[1]] * ids.shape[0])

    def _finish(self, *results: mx.array) -> None:
        """Wait for a step that reads slots which the next one, of any thread, may write.

        MLX gives every thread a stream of its own, and only work in one stream is in order.
        """
        if self.offload and not self.offload.holds_all:
            mx.eval(results)

    def run(self, ids: mx.array, cache: Sequence[CacheEntry], step: ForwardBatch) -> mx.array:
        """ids [B, T] -> [B, T, hidden]; the entries' arrays move on, their lengths do not."""
        x, part = self._attended(ids, cache, step)
        x, part = self.layers[-1].fed_forward(x, part, self.reduce)
        return self.norm.of_sum(x, part)[1]

    def _attended(
        self, ids: mx.array, cache: Sequence[CacheEntry], step: ForwardBatch
    ) -> tuple[mx.array, mx.array]:
        """All but the last layer's MLP or MoE: the residual stream, and the part to add to it.

        Many tokens are computed half a layer at a time.
        """
        many = ids.shape[1] > 1 and ids.size >= SUBMITTED_FROM  # (one token may be in a graph)
        if many:
            columns = max(cache[0].lengths, default=0) + ids.shape[1]
            step = replace(step, ahead=SubmitLimit(1 if columns < ONE_BY_ONE_FROM else 0))
        x = self.embed_tokens.rows(ids)
        x, part = self.layers[0].attended(x, None, cache[0], step, self.reduce)
        for (before, layer), entry in zip(pairwise(self.layers), cache[1:], strict=True):
            x, part = before.fed_forward(x, part, self.reduce)
            step.submit(x, part)
            x, part = layer.attended(x, part, entry, step, self.reduce)
        return x, part

    def first_not_finite(self, ids: mx.array) -> str | None:
        """Where NaN or infinity first comes up when ids [B, T] are read from nothing.

        `layers.3.mlp`, or another module's path; None: nowhere.
        """
        cache, step = self.make_cache(), ForwardBatch()
        x, part = self.embed_tokens.rows(ids), None
        if not _is_finite(x):
            return "embed_tokens"
        for number, (layer, entry) in enumerate(zip(self.layers, cache, strict=True)):
            x, part = layer.attended(x, part, entry, step, self.reduce)
            if not _is_finite(part):
                return f"layers.{number}.self_attn"
            x, part = layer.fed_forward(x, part, self.reduce)
            if not _is_finite(part):
                return f"layers.{number}.mlp"
        hidden = self.norm.of_sum(x, part)[1]
        if not _is_finite(hidden):
            return "norm"
        return None if _is_finite(self.logits(hidden)) else "lm_head"

    def logits(self, hidden: mx.array) -> mx.array:
        """[..., hidden] after the last norm -> [..., vocab]."""
        return self.lm_head(hidden)

    def make_cache(self, latent_bits: int | None = None) -> list[CacheEntry]:
        """An empty cache: one typed entry a layer, for a batch of any size.

        `latent_bits` 8 stores the latents of MLA layers, but for the latest, in 8 bits.
        """
        return [
            KDACache() if layer.attention == "kda" else LatentCache(bits=latent_bits)
            for layer in self.config.layers
        ]


def _is_finite(x: mx.array) -> bool:
    return bool(mx.isfinite(x).all().item())


def _count(cache: Sequence[CacheEntry], real: Sequence[int]) -> None:
    """Note that the entries have read so many more tokens of each row."""
    for entry in cache:
        read = entry.lengths or (0,) * len(real)
        entry.lengths = tuple(n + new for n, new in zip(read, real, strict=True))
