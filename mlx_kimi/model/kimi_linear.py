"""Kimi Linear: embed, then blocks of (KDA or MLA) and (MoE or MLP), then norm and lm_head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from mlx_kimi.checkpoint.config import Layer, ModelConfig
from mlx_kimi.metal_kernels.attention import SubmitLimit
from mlx_kimi.metal_kernels.tuning import Choices
from mlx_kimi.model.cache import CacheEntry, KDACache, LatentCache, empty_cache
from mlx_kimi.model.compiled import CompiledStep
from mlx_kimi.model.forward_batch import ForwardBatch, rows_of
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

    It may be a part: some of the layers, one after another. The part that begins at layer 0 embeds
    ids; any other is given what the part before it gives, x and residual [2, B, T, hidden], where
    a whole model is given ids [B, T]. Only the part with the last layer has an lm_head.

    Several threads may use it, each with a cache of its own: `hidden`, `advance`, a call and
    `first_not_finite` take turns, a forward pass each.

    Attributes:
        one_text: whether a step is of one text only.
    """

    one_text = False

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        reduce: Callable[[mx.array], mx.array] = lambda x: x,
        offload: ExpertOffload | None = None,
        choices: Choices | None = None,
        part: range | None = None,
    ) -> None:
        """`reduce` adds up a layer's output over the ranks of a sharded model.

        `offload` fills the expert caches that `weights` names; None: there are none.
        `choices`: which kernels run, and in which shapes; None: the GPU's defaults.
        `part`: the layers that are here; None: all.
        """
        super().__init__()
        self.config = config
        self.choices = choices or Choices.default()
        self.offload = offload
        self.part = part or range(len(config.layers))
        self.is_last_part = self.part.stop == len(config.layers)
        self.embed_tokens = None if self.part.start else weights.linear("model.embed_tokens")
        self.layers = [
            DecoderLayer(config, config.layers[n], weights.at(f"model.layers.{n}"), reduce)
            for n in self.part
        ]
        self.norm = RMSNorm(weights.array("model.norm.weight"), config.rms_norm_eps)
        self.lm_head = None
        if self.is_last_part:
            tied = config.tie_word_embeddings
            both = tied and self.embed_tokens is not None
            head = "model.embed_tokens" if tied else "lm_head"
            self.lm_head = self.embed_tokens if both else weights.linear(head)
        self.compiled = CompiledStep(self)
        self._turn = Lock()

    @property
    def kinds(self) -> Sequence[Layer]:
        """What the layers are that are here."""
        return self.config.layers[self.part.start : self.part.stop]

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

        A part without the last layer gives x and residual [2, B, T, hidden] instead.

        With a list of `steps`, which becomes one a layer, `keep_first` can go back within these
        tokens, of which there are two at least and none is padding.
        """
        B, T = rows_of(ids)
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
            B, T = rows_of(ids)
            _advance_lengths(cache, [T] * B)

    @contextmanager
    def reading(self, ids: Sequence[int], step: int) -> Iterator[None]:
        """Within, the tokens `ids` of one text are read, `step` at once.

        A model over several ranks begins later steps meanwhile; this one does nothing more.
        """
        yield

    def _finish(self, *results: mx.array) -> None:
        """Wait for a step that reads slots which the next one, of any thread, may write.

        MLX gives every thread a stream of its own, and only work in one stream is in order.
        """
        if self.offload and not self.offload.holds_all:
            mx.eval(results)
            self.offload.optimistic.end_step()

    def run(self, ids: mx.array, cache: Sequence[CacheEntry], batch: ForwardBatch) -> mx.array:
        """ids [B, T] -> what `hidden` gives; updates the cache's arrays, not its lengths.

        `hidden` and `advance` count the tokens, and take turns.
        """
        x, residual = self._forward_layers(ids, cache, batch)
        return self.norm.add_norm(x, residual)[0] if self.is_last_part else mx.stack([x, residual])

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
        B, T = rows_of(ids)
        if T > 1 and batch.plan is None:  # (with a plan it may be in a graph)
            batch = replace(batch, submit_limit=_submit_limit(cache, B, T))
        x, residual = self._begin(ids)
        for layer, entry in zip(self.layers, cache, strict=True):
            if layer is self.layers[-1] and not output_wanted:
                return layer.attention(x, residual, entry, batch)
            x, residual = layer(x, residual, entry, batch)
        assert residual is not None, "a model has layers"
        return x, residual

    def _begin(self, ids: mx.array) -> tuple[mx.array, mx.array | None]:
        """ids [B, T] -> x [B, T, hidden] in the model's dtype, and no residual; small floats are
        bfloat16 at first. Of a later part: x and residual as they are given."""
        if self.embed_tokens is None:
            return ids[0], ids[1]
        return self.embed_tokens.rows(ids).astype(self.norm.weight.dtype), None

    def first_not_finite(self, ids: mx.array) -> str | None:
        """Where NaN or infinity first comes up when ids [B, T] are read from nothing.

        `layers.3.mlp`, or another module's path, whose output or residual sum is not finite; None:
        nowhere.
        """
        return self.find_not_finite(ids)[0]

    def find_not_finite(self, ids: mx.array) -> tuple[str | None, mx.array]:
        """As `first_not_finite`, of the layers that are here; and what `hidden` gives of `ids`."""
        with self._turn, self.choices.use():
            return self._find_not_finite(ids)

    def _find_not_finite(self, ids: mx.array) -> tuple[str | None, mx.array]:
        cache, batch = empty_cache(self.kinds), ForwardBatch()
        places: list[str] = []

        def look(place: str, x: mx.array) -> None:
            if not _is_finite(x):
                places.append(place)

        x, residual = self._begin(ids)
        look("embed_tokens", x)
        for number, layer, entry in zip(self.part, self.layers, cache, strict=True):
            x, residual = layer.attention(x, residual, entry, batch)
            look(f"layers.{number}.self_attn", x + residual)
            x, residual = layer.feed_forward(x, residual, batch)
            look(f"layers.{number}.mlp", x + residual)
        assert residual is not None, "a model has layers"
        if not self.is_last_part:
            return next(iter(places), None), mx.stack([x, residual])
        hidden, _ = self.norm.add_norm(x, residual)
        look("norm", hidden)
        look("lm_head", self.logits(hidden))
        return next(iter(places), None), hidden

    def logits(self, hidden: mx.array) -> mx.array:
        """[..., hidden] after the last norm -> [..., vocab]."""
        assert self.lm_head is not None, "the part with the last layer gives logits"
        return self.lm_head(hidden)

    def make_cache(self, latent_bits: int | None = None) -> list[CacheEntry]:
        """An empty cache: one typed entry a layer, for a batch of any size.

        `latent_bits` 8 stores the latents of MLA layers, but for the latest, in 8 bits.
        """
        return empty_cache(self.kinds, latent_bits)

    def cache_of(self, entries: list[CacheEntry], latent_bits: int | None) -> list[CacheEntry]:
        """A cache of this model: `entries` of all layers, as files hold them, of `latent_bits`."""
        return entries


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
