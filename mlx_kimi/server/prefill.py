"""Prompts are read one at a time, unpadded, slice by slice; states on the way go into the tree."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import prod

import mlx.core as mx
import numpy as np

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.tensors import Join, tensors
from mlx_kimi.defaults import CONTEXT, PREFILL_STEP, SNAPSHOT_EVERY
from mlx_kimi.errors import KimiError
from mlx_kimi.model import cache as caches
from mlx_kimi.model.cache import CacheEntry
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.server.job import Job, Tally
from mlx_kimi.server.prefix_tree import Found, PrefixTree, State, as_array, common_prefix

APART = 64  # tokens between two states of a text at least: boundaries nearer share one
SLICE_SECONDS = 0.4  # of a slice late in a long prompt, at most
LEAST_SLICE = 16


class Prefill:
    """Reads the prompts of jobs, from the latest state that the tree has of each."""

    def __init__(
        self,
        model: KimiLinear,
        tree: PrefixTree,
        tally: Tally,
        slice_tokens: int,
        latent_bits: int | None,
    ) -> None:
        self.model, self.tree, self.slice_tokens = model, tree, slice_tokens
        self._latent_bits, self._tally = latent_bits, tally

    def know(self, ids: Sequence[int], entries: Sequence[CacheEntry]) -> None:
        """Give the tree a state that was read elsewhere, and that many prompts go on from."""
        self.tree.insert(as_array(ids), State(caches.snapshot(entries), is_shared=True))

    def begin(self, job: Job) -> None:
        """Give the job a cache, and say where its reading pauses."""
        ids = job.ids
        found, state = self._found(ids)
        self.tree.use(found)
        entries, hidden = self.model.make_cache(self._latent_bits), None
        if state is not None:
            entries = caches.snapshot(state.entries)
            hidden = state.hidden if found.length == len(ids) else None
        job.begin(entries, found.length, hidden)
        job.cached, job.why = found.length, found.why
        job.stops = stops(job.ticket.request.boundaries, job.read, len(ids))
        job.tell_progress()

    def _found(self, ids: np.ndarray) -> tuple[Found, State | None]:
        """What a text goes on from; what is stored but damaged is told, and read again."""
        damage = ""
        while True:
            found = self.tree.find(ids)
            try:
                is_whole = found.length == len(ids)
                state = None if found.node is None else self.tree.load(found.node, is_whole)
            except KimiError as error:
                damage = str(error)
            else:
                return found._replace(why=damage or found.why), state

    def read_slice(self, job: Job) -> mx.array | None:
        """Read more of a job's text: the final hidden state of its last token, [1, 1, hidden].

        None: some of it is left.

        Raises:
            RuntimeError: the device failed. The job's state is as it was.
        """
        ids = job.ids
        if job.hidden is not None:
            return job.hidden
        assert job.entries is not None
        end = min([job.read + self.slice_tokens, len(ids), *(s for s in job.stops if s > job.read)])
        hidden = self._read(ids[job.read : end], job.entries, end == len(ids))
        self._tally.add(read_tokens=end - job.read)
        job.read = end
        if end in job.stops:
            self.keep(job, hidden)
        job.tell_progress()
        return hidden

    def keep(self, job: Job, hidden: mx.array | None = None) -> None:
        """Give the tree the state that a job's reading has come to."""
        assert job.entries is not None
        is_shared = job.read == min(job.ticket.request.boundaries, default=0)
        state = State(caches.snapshot(job.entries), hidden, is_shared)
        self.tree.insert(job.ids[: job.read], state)
        job.kept = job.read

    def _read(
        self, ids: np.ndarray, entries: list[CacheEntry], output_wanted: bool
    ) -> mx.array | None:
        """Read tokens [T]; whatever ends that early leaves `entries` as they were."""
        before = caches.snapshot(entries)
        try:
            return read(self.model, ids, entries, output_wanted)
        except BaseException:
            caches.restore(entries, before)
            raise

    def should_wait(self, job: Job, readings: Sequence[Job]) -> bool:
        """Whether another job, which is being read, will soon give the tree a later state of this
        text than it has."""
        ids, known = job.ids, None
        for other in readings:
            shared = common_prefix(ids, other.ids)
            coming = [stop for stop in other.stops if other.read < stop <= shared]
            if not coming:
                continue
            known = self.tree.find(ids).length if known is None else known
            if coming[-1] >= known + APART:
                return True
        return False


def read(
    model: KimiLinear, ids: np.ndarray, entries: list[CacheEntry], output_wanted: bool = False
) -> mx.array | None:
    """Read tokens [T], and wait for it: the last's final hidden state [1, 1, hidden], if wanted."""
    hidden = None
    if output_wanted:
        hidden = mx.contiguous(model.hidden(mx.array(ids[None]), entries)[:, -1:])
        mx.eval(hidden, caches.arrays(entries))
    else:
        model.advance(mx.array(ids[None]), entries)
        mx.eval(caches.arrays(entries))
    return hidden


def stops(boundaries: Sequence[int], start: int, length: int) -> list[int]:
    """Where states are kept of a text that is read after its first `start` tokens: at boundaries,
    every few thousand tokens and at its end, but for places that come soon after another.

    The first boundary and the last always count: other texts go on from there.
    """
    always = (min(boundaries), max(boundaries)) if boundaries else ()
    regular = range(SNAPSHOT_EVERY, length, SNAPSHOT_EVERY)
    chosen, latest = [], start
    for place in sorted({*boundaries, *regular, length}):
        is_inside = start < place <= length
        if is_inside and (place - latest >= APART or place in always):
            chosen.append(place)
            latest = place
    return chosen


def measured_slice(
    model: KimiLinear, latent_bits: int | None, seconds: Callable[[int], float] | None = None
) -> int:
    """How many tokens of a long prompt are read in `SLICE_SECONDS` here: a power of two.

    Slices of new texts are timed; late in a long one they take longer, by what attention adds.

    Args:
        seconds: what a slice of so many tokens takes in a new text; None: it is timed.
    """

    def timed(count: int) -> float:
        ids = np.arange(count) % model.config.vocab_size
        read(model, ids, model.make_cache(latent_bits))  # the first time, kernels are compiled
        began = time.perf_counter()
        read(model, ids, model.make_cache(latent_bits))
        return time.perf_counter() - began

    seconds = seconds or timed
    later = late_in_a_text(model.config)
    most = PREFILL_STEP if model.offload is None else model.offload.prefill_step
    count = min(LEAST_SLICE, most)
    while 2 * count <= most and later * seconds(2 * count) <= SLICE_SECONDS:
        count *= 2
    return count


def late_in_a_text(config: ModelConfig) -> float:
    """How much more work a token is after `CONTEXT` others than in a new text: multiplications with
    matrices, and those with the keys and values of all tokens before it."""
    share = config.num_experts_per_token / max(1, config.num_experts)
    matrices = sum(
        prod(each.shape) * (share if each.join is Join.STACK else 1)
        for each in tensors(config)
        if each.matrix
    )
    layers = [layer.attention for layer in config.layers].count("mla")
    head = config.qk_head_dim + config.v_head_dim
    before = min(CONTEXT, config.model_max_length)
    return 1 + layers * config.num_attention_heads * head * before / matrices
