"""Causal attention over blocks of keys, by online softmax: no tensor of all scores exists."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from itertools import accumulate
from typing import NamedTuple

import mlx.core as mx

from mlx_kimi.metal_kernels.fused import fused
from mlx_kimi.metal_kernels.matmul import times_transposed

# Lower than any score, and finite: a query that sees no key of a block must not compute inf - inf.
NO_KEY = -1e30
# Queries that are masked together; keys after the last of them are left out. A CPU gains from
# leaving out more, a GPU from fewer launches.
QUERY_BLOCK, GPU_QUERY_BLOCK = 128, 512

# KV positions whose scores for one token are one tensor (8 MB for 32 heads): a few launches more
# for each of many segments would cost more than their arithmetic.
ONE_TOKEN_POSITIONS = 1 << 16


class Block(NamedTuple):
    """Keys and values of consecutive positions, the first of which is `start`."""

    start: int
    keys: mx.array  # [B, H or 1, S, Dk]
    values: mx.array  # [B, H or 1, S, Dv]

    @property
    def size(self) -> int:
        return self.keys.shape[2]

    def first_positions(self, count: int) -> Block:
        """The block without its positions from `count` on."""
        if count >= self.size:
            return self
        count = max(count, 0)
        return Block(self.start, self.keys[:, :, :count], self.values[:, :, :count])


def attend(
    queries: mx.array,
    blocks: Iterable[Block],
    scale: float,
    first: int,
    ahead: SubmitLimit | None = None,
) -> mx.array:
    """softmax(scale * queries keys^T) values over all blocks together.

    Query t stands at position `first` + t and sees the positions up to its own.

    Args:
        queries: [B, H, T, Dk].
        ahead: takes the work on each block; None: one of this call's own.

    Returns:
        [B, H, T, Dv] in the queries' dtype.
    """
    T, size = queries.shape[2], query_block()
    # Scores are made in float32: rounded to 16 bits before the softmax, large ones would be off by
    # more than the whole rest of the model. MLX has no product of 16-bit matrices that is not
    # rounded so; keys are copied to float32, one block at a time.
    scaled = queries.astype(mx.float32) * scale
    rows = [_Rows(scaled[:, :, start : start + size], first + start) for start in range(0, T, size)]
    ahead = ahead or SubmitLimit()
    before: tuple[mx.array, mx.array] | None = None  # (what comes last is the caller's to submit)
    for group in _groups(blocks, ONE_TOKEN_POSITIONS if T == 1 else 0):
        for part in rows:
            if T > 1 and before is not None:
                ahead.submit(*before)
            part.meet(group)
            before = part.sums
    output = [part.result() for part in rows]
    return (output[0] if len(output) == 1 else mx.concatenate(output, axis=2)).astype(queries.dtype)


def query_block() -> int:
    """The queries of a block on the device at hand."""
    return QUERY_BLOCK if mx.default_device() == mx.Device(mx.cpu) else GPU_QUERY_BLOCK


class SubmitLimit:
    """Keeps the host some pieces of work ahead of the device, and no further.

    Left to itself MLX holds what all pieces need at the same time: gigabytes.
    """

    def __init__(self, pieces: int = 1, parts: int = 1) -> None:
        """`pieces` may be unfinished when the next is submitted; `parts` gathered make one."""
        self._pieces = pieces
        self._parts = parts
        self._gathered: list[tuple[mx.array, ...]] = []
        self._unfinished: deque[tuple[mx.array, ...]] = deque()

    def gather(self, *results: mx.array) -> None:
        """Submit these with those of the parts before, once there are enough."""
        self._gathered.append(results)
        if len(self._gathered) == self._parts:
            self.submit(*(array for part in self._gathered for array in part))
            self._gathered.clear()

    def submit(self, *results: mx.array) -> None:
        """Wait for all but the latest pieces, and let the device begin `results`."""
        while len(self._unfinished) > self._pieces:
            mx.eval(*self._unfinished.popleft())
            if self._pieces == 0:  # a finished piece gives back its memory a little later
                mx.synchronize()
        mx.async_eval(*results)
        self._unfinished.append(results)


class _Rows:
    """A block of queries, and the softmax over the keys that it has met so far."""

    def __init__(self, queries: mx.array, first: int) -> None:
        T = queries.shape[2]
        self.queries, self.first, self.end = queries, first, first + T
        self.sums: tuple[mx.array, mx.array] | None = None  # lse, output

    def meet(self, blocks: Sequence[Block]) -> None:
        """Take some blocks into the softmax, with one product for the scores of each."""
        seen = [block.first_positions(self.end - block.start) for block in blocks]
        seen = [block for block in seen if block.size]
        if not seen:
            return
        masks = [self._visible(block) for block in seen]
        scores = _joined([self._scores(*each) for each in zip(seen, masks, strict=True)])
        all_see = all(mask is None for mask in masks)
        probs, lse = _softmax(scores, seen[0].values, all_see)
        output = _weighed(probs, [block.values for block in seen])
        if self.sums is not None:
            lse, output = merge_attention(*self.sums, lse, output)
        self.sums = lse, output

    def _scores(self, block: Block, visible: mx.array | None) -> mx.array:
        """[B, H, T, S] float32; -inf where the query may not see the position."""
        scores = _product(self.queries, block.keys.astype(mx.float32), times_transposed)
        return scores if visible is None else mx.where(visible, scores, -mx.inf)

    def _visible(self, block: Block) -> mx.array | None:
        """Which positions each query may see; None: all."""
        end = block.start + block.size
        if end <= self.first + 1:
            return None
        return mx.arange(block.start, end) <= mx.arange(self.first, self.end)[:, None]  # [T, S]

    def result(self) -> mx.array:
        assert self.sums is not None, "the queries' own positions are always among the blocks"
        return self.sums[1]


def _softmax(scores: mx.array, values: mx.array, all_see: bool) -> tuple[mx.array, mx.array]:
    """Of each row its softmax, in the dtype of the values that it weighs, and its lse.

    A GPU is bound by how often scores are read and written, a CPU by how many exponentials it
    takes: each has the form that suits it. For one token, all of whose scores are here as a rule,
    nobody asks for the lse, and it is not computed.

    all_see: no score is masked.
    """
    if all_see and scores.shape[2] == 1:
        return mx.softmax(scores, axis=-1).astype(values.dtype), mx.logsumexp(
            scores, axis=-1, keepdims=True
        )
    if mx.default_device() == mx.Device(mx.cpu):
        m = mx.maximum(scores.max(axis=-1, keepdims=True), NO_KEY)
        probs = mx.exp(scores - m)
        total = mx.maximum(probs.sum(axis=-1, keepdims=True), 1e-30)  # (0 where no key is seen)
        return (probs / total).astype(values.dtype), m + mx.log(total)
    lse = mx.maximum(mx.logsumexp(scores, axis=-1, keepdims=True), NO_KEY)
    return _probs(scores, lse, values), lse


@fused()
def _probs(scores: mx.array, lse: mx.array, values: mx.array) -> mx.array:
    return mx.exp(scores - lse).astype(values.dtype)


@fused()
def merge_attention(
    lse: mx.array, output: mx.array, other_lse: mx.array, other_output: mx.array
) -> tuple[mx.array, mx.array]:
    """The softmax over two groups of positions, from those over each.

    `lse` [..., 1] and `output` [..., Dv]: float32, of the same queries.
    """
    merged = mx.logaddexp(lse, other_lse)
    weight, other_weight = mx.exp(lse - merged), mx.exp(other_lse - merged)
    return merged, output * weight + other_output * other_weight


def _groups(blocks: Iterable[Block], positions: int) -> Iterator[list[Block]]:
    """Neighbouring blocks of up to so many positions together; a larger one by itself."""
    group: list[Block] = []
    for block in blocks:
        if group and sum(b.size for b in group) + block.size > positions:
            yield group
            group = []
        group.append(block)
    if group:
        yield group


def _joined(arrays: list[mx.array]) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=-1)


def _weighed(probs: mx.array, values: list[mx.array]) -> mx.array:
    """probs [B, H, T, S of all] times the values of each block, summed: [B, H, T, Dv] float32."""
    ends = list(accumulate(v.shape[2] for v in values))[:-1]
    parts = mx.split(probs, ends, axis=-1) if ends else [probs]
    output = [
        _product(part, v, mx.matmul).astype(mx.float32)
        for part, v in zip(parts, values, strict=True)
    ]
    return reduce(mx.add, output)


def _product(
    x: mx.array, y: mx.array, multiply: Callable[[mx.array, mx.array], mx.array]
) -> mx.array:
    """x [B, H, T, n] times y [B, H or 1, ...]: heads that share y are rows of one product.

    On CPU that is five times as fast as a product for each head, for which MLX may copy y.
    """
    B, H, T, n = x.shape
    if y.shape[1] == 1:
        return multiply(x.reshape(B, 1, H * T, n), y).reshape(B, H, T, -1)
    return multiply(x, y)
