"""Kimi Linear: embed, then blocks of (KDA or MLA) and (MoE or MLP), then norm and lm_head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from mlx_kimi.checkpoint.config import Layer, ModelConfig
from mlx_kimi.metal_kernels.attention import SubmitLimit
from mlx_kimi.metal_kernels.tuning import Choices
from mlx_kimi.model.cache import CacheEntry, KDACache, LatentCache
from mlx_kimi.model.compiled import CompiledStep
from mlx_kimi.model.forward_batch import ForwardBatch
from mlx_kimi.model.kda import KimiDeltaAttention
from mlx_kimi.model.layers import MLP, RMSNorm
from mlx_kimi.model.mla import MultiHeadLatentAttention
from mlx_kimi.model.moe import MixtureOfExperts
from mlx_kimi.model.steps import Step
from mlx_kimi.model.weights import Weights

if TYPE_CHECKING:
    from mlx_kimi.offload.offload import ExpertOffload

# Halves of layers are queued in pieces, each as soon as it is built: the device works while the
# host builds the next. A piece is one half of this many tokens, two of half as many, and so on:
# queueing takes the host a quarter of a millisecond. Two pieces are queued at a time, each with the
# memory it works in; from ONE_BY_ONE_FROM tokens of context on, where latents take more, one.
PIECE_TOKENS = 512
ONE_BY_ONE_FROM = 16_384


class DecoderLayer(nn.Module):
    """h = x + Attention(RMSNorm(x));  y = h + FeedForward(RMSNorm(h)).

    A residual addition and the norm after it are one launch. Layers and their halves therefore pass
    two arrays, both [B, T, hidden]: `x`, the output of the latest half, and `residual`, the stream
    that x has not been added to yet; None before the first layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: Layer,
        weights: Weights,
        reduce: Callable[[mx.array], mx.array] = lambda x: x,
    ) -> None:
        """`reduce` adds up x over the ranks of a sharded model."""
        super().__init__()
        eps = config.rms_norm_eps
        attention, mlp = weights.at("self_attn"), weights.at("mlp")
        self.reduce = reduce
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

    def __call__(
        self, x: mx.array, residual: mx.array | None, entry: CacheEntry, batch: ForwardBatch
    ) -> tuple[mx.array, mx.array]:
        """x and residual before the layer -> after it; updates `entry`."""
        x, residual = self.attention(x, residual, entry, batch)
        return self.feed_forward(x, residual, batch)

    def attention(
        self, x: mx.array, residual: mx.array | None, entry: CacheEntry, batch: ForwardBatch
    ) -> tuple[mx.array, mx.array]:
        """The first half of a call."""
        normed, residual = self.input_layernorm.add_norm(x, residual)
        x = self.reduce(self.attend(normed, entry, batch))
        # With the entry's arrays, which would keep alive what they are made of.
        batch.submit(x, residual, *entry.arrays())
        return x, residual

    def attend(self, normed: mx.array, entry: CacheEntry, batch: ForwardBatch) -> mx.array:
        """KDA or MLA alone: [B, T, hidden] -> the same; on one of several ranks, its part."""
        if isinstance(self.self_attn, KimiDeltaAttention):
            assert isinstance(entry, KDACache)
            return self.self_attn(normed, entry, batch.lengths, batch.zeros, batch.steps)
        assert isinstance(entry, LatentCache)
        return self.self_attn(
            normed, entry, batch.counts, batch.plan, batch.submit_limit, batch.steps
        )

    def feed_forward(
        self, x: mx.array, residual: mx.array, batch: ForwardBatch
    ) -> tuple[mx.array, mx.array]:
        """The second half of a call."""
        norm = self.post_attention_layernorm
        x, residual = self.mlp.norm_and_forward(norm, x, residual, batch.residency)
        x = self.reduce(x)
        batch.submit(x, residual)
        return x, residual


class KimiLinear(nn.Module):
    """The model of one folder. Heads and experts are counted from the weights it is given.

    Several threads may use it, each with a cache of its own: `hidden`, `advance`, a call and
    `first_not_finite` take turns, a forward pass each.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        reduce: Callable[[mx.array], mx.array] = lambda x: x,
        offload: ExpertOffload | None = None,
        choices: Choices | None = None,
    ) -> None:
        """`reduce` adds up a layer's output over the ranks of a sharded model.

        `offload` fills the expert caches that `weights` names; None: there are none.
        `choices`: which kernels run, and in which shapes; None: the GPU's defaults.
        """
        super().__init__()
        self.config = config
        self.choices = choices or Choices.default()
        self.offload = offload
        self.embed_tokens = weights.linear("model.embed_tokens")
        self.layers = [
            DecoderLayer(config, layer, weights.at(f"model.layers.{number}"), reduce)
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
        """ids [B, T] -> logits [B, T, vocab]; updates `cache` by these tokens.

        Args:
            cache: from `make_cache`; None reads the tokens from nothing.
            lengths: [B], how many of the T tokens are valid; the rest is padding on the right,
                whose logits mean nothing. None: all T.
        """
        return self.logits(self.hidden(ids, cache, lengths))

    def hidden(
        self,
        ids: mx.array,
        cache: list[CacheEntry] | None = None,
        lengths: Sequence[int] | None = None,
        steps: list[Step] | None = None,
    ) -> mx.array:
        """ids [B, T] -> final hidden states [B, T, hidden]: after the last norm, before lm_head.

        With a list of `steps`, which becomes one a layer, `keep_first` can go back within these
        tokens, of which there are two at least and none is padding.
        """
        B, T = ids.shape
        if steps is not None and (T < 2 or lengths is not None):
            raise ValueError(f"[hidden] steps must be of 2 tokens or more, unpadded, but T is {T}.")
        counts = [T] * B if lengths is None else [int(length) for length in lengths]
        cache = self.make_cache() if cache is None else cache
        with self._turn, self.choices.use():
            if min(counts) < T:
                x = self.run(ids, cache, ForwardBatch.padded(counts))
            elif self.compiled.takes(cache, T):
                x = self.compiled(ids, cache, steps)
            else:
                x = self.run(ids, cache, ForwardBatch(steps=steps))
            self._finish(x)
            _advance_lengths(cache, counts)
        return x

    def advance(self, ids: mx.array, cache: list[CacheEntry]) -> None:
        """Update `cache` by ids [B, T], whose output is not needed."""
        with self._turn, self.choices.use():
            self._finish(*self._forward_layers(ids, cache, ForwardBatch(), output_wanted=False))
            _advance_lengths(cache, [ids.shape[1]] * ids.shape[0])

    def _finish(self, *results: mx.array) -> None:
        """Wait for a step that reads slots which the next one, of any thread, may write.

        MLX gives every thread a stream of its own, and only work in one stream is in order.
        """
        if self.offload and not self.offload.holds_all:
            mx.eval(results)
            self.offload.optimistic.end_step()

    def run(self, ids: mx.array, cache: Sequence[CacheEntry], batch: ForwardBatch) -> mx.array:
        """ids [B, T] -> final hidden states [B, T, hidden]; updates arrays, not lengths.

        `hidden` and `advance` count the tokens, and take turns.
        """
        x, residual = self._forward_layers(ids, cache, batch)
        return self.norm.add_norm(x, residual)[0]

    def _forward_layers(
        self,
        ids: mx.array,
        cache: Sequence[CacheEntry],
        batch: ForwardBatch,
        output_wanted: bool = True,
    ) -> tuple[mx.array, mx.array]:
        """ids [B, T] -> x and residual [B, T, hidden] after the last layer.

        Where no output is wanted, after that layer's attention: its experts would be for nothing.
        """
        if ids.shape[1] > 1 and batch.plan is None:  # (with a plan it may be in a graph)
            batch = replace(batch, submit_limit=_submit_limit(cache, *ids.shape))
        x, residual = self._embed(ids), None
        for layer, entry in zip(self.layers, cache, strict=True):
            if layer is self.layers[-1] and not output_wanted:
                return layer.attention(x, residual, entry, batch)
            x, residual = layer(x, residual, entry, batch)
        assert residual is not None, "a model has layers"
        return x, residual

    def _embed(self, ids: mx.array) -> mx.array:
        """ids [B, T] -> [B, T, hidden] in the model's dtype: small floats are bfloat16 at first."""
        return self.embed_tokens.rows(ids).astype(self.norm.weight.dtype)

    def first_not_finite(self, ids: mx.array) -> str | None:
        """Where NaN or infinity first comes up when ids [B, T] are read from nothing.

        `layers.3.mlp`, or another module's path, whose output or residual sum is not finite; None:
        nowhere.
        """
        with self._turn, self.choices.use():
            return self._first_not_finite(ids)

    def _first_not_finite(self, ids: mx.array) -> str | None:
        cache, batch = self.make_cache(), ForwardBatch()
        x, residual = self._embed(ids), None
        if not _is_finite(x):
            return "embed_tokens"
        for number, (layer, entry) in enumerate(zip(self.layers, cache, strict=True)):
            x, residual = layer.attention(x, residual, entry, batch)
            if not _is_finite(x + residual):
                return f"layers.{number}.self_attn"
            x, residual = layer.feed_forward(x, residual, batch)
            if not _is_finite(x + residual):
                return f"layers.{number}.mlp"
        hidden, _ = self.norm.add_norm(x, residual)
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


def _submit_limit(cache: Sequence[CacheEntry], B: int, T: int) -> SubmitLimit:
    """Of a step of T tokens in each of B rows after those in `cache`."""
    length = max(cache[0].lengths, default=0) + T
    return SubmitLimit(1 if length < ONE_BY_ONE_FROM else 0, -(-PIECE_TOKENS // (B * T)))


def _advance_lengths(cache: Sequence[CacheEntry], tokens: Sequence[int]) -> None:
    """Note that the entries have read so many more tokens of each row."""
    for entry in cache:
        before = entry.lengths or (0,) * len(tokens)
        entry.lengths = tuple(n + new for n, new in zip(before, tokens, strict=True))
