"""Rows of unlike texts, answered together: one step of the model draws a token of each."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_kimi.defaults import SNAPSHOT_EVERY
from mlx_kimi.generation.drafts import Learned
from mlx_kimi.generation.lookup import Draft
from mlx_kimi.generation.not_finite import not_finite
from mlx_kimi.generation.sample import BatchSampler, masked
from mlx_kimi.generation.token_state import common_prefix
from mlx_kimi.model import cache as caches
from mlx_kimi.model.cache import CacheEntry
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.steps import Step, keep_first
from mlx_kimi.server.job import Job, Tally
from mlx_kimi.server.lone_row import LoneRow
from mlx_kimi.server.prefix_tree import PrefixTree, State


@dataclass(frozen=True)
class Drawn:
    """A token of each row, and what is told of it; the device may still be computing it."""

    token: mx.array  # [B]
    lse: mx.array  # [B] float32, finite unless a logit is NaN or +infinity
    logprob: mx.array  # [B] float32, of the token; empty where no row wants any
    top_ids: mx.array  # [B, K], of the likeliest tokens, in any order; empty likewise
    top: mx.array  # [B, K] float32, their logprobs

    @staticmethod
    def of(logits: mx.array, token: mx.array, jobs: Sequence[Job]) -> Drawn:
        """logits [B, vocab], and tokens [B] that were drawn from them for these jobs."""
        logits = logits.astype(mx.float32)
        lse = mx.logsumexp(logits, axis=-1)
        wanted = [job.ticket.request.logprobs for job in jobs]
        counts = [count for count in wanted if count is not None]
        if not counts:
            nothing = mx.zeros((len(jobs), 0))
            return Drawn(token, lse, nothing, nothing, nothing)
        logprobs = logits - lse[:, None]
        logprob = mx.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
        count = min(max(counts), logits.shape[-1])
        ids = mx.argpartition(-logprobs, max(count, 1) - 1, axis=-1)[:, :count]
        return Drawn(token, lse, logprob, ids, mx.take_along_axis(logprobs, ids, axis=-1))

    def arrays(self) -> list[mx.array]:
        return list(vars(self).values())

    def take(self, rows: Sequence[int]) -> Drawn:
        """These rows, in this order."""
        index = mx.array(list(rows))
        return Drawn(*(array[index] for array in self.arrays()))

    def teach(self, jobs: Sequence[Job]) -> None:
        """Wait for the tokens, and let each row that must obey find out what may follow."""
        tokens: Any = self.token.tolist()
        for job, token in zip(jobs, tokens, strict=True):
            job.learn(token)

    def tell(self, model: KimiLinear, jobs: Sequence[Job]) -> set[Job]:
        """Wait for the tokens, and tell each row's; the jobs that are over by that."""
        values: Any = [array.tolist() for array in self.arrays()]
        tokens, lses, logprobs, ids, tops = values
        ended = set[Job]()
        for row, (job, token) in enumerate(zip(jobs, tokens, strict=True)):
            if not math.isfinite(lses[row]):
                job.fail(not_finite(model, job.ids.tolist()))
                ended.add(job)
                continue
            has_any = job.ticket.request.logprobs is not None
            top = sorted(zip(ids[row], tops[row], strict=True), key=lambda pair: -pair[1])
            if job.tell_token(token, logprobs[row] if has_any else None, top):
                ended.add(job)
        return ended


class Batch:
    """Jobs that are being answered, a row each."""

    def __init__(
        self, model: KimiLinear, tree: PrefixTree, tally: Tally, learned: Learned | None
    ) -> None:
        """`learned`: of the drafts that a row has which runs alone; None: it has none."""
        self.model, self.tree, self._tally, self._learned = model, tree, tally, learned
        self._lone: LoneRow | None = None  # the row that ran alone last
        self.jobs: list[Job] = []
        self._entries: list[CacheEntry] = []
        self._sampler = BatchSampler([])
        self._inputs = mx.array([], mx.uint32)  # [B], the tokens that the next step reads
        self._drawn: Drawn | None = None  # what of `_inputs` is not told: of the first rows

    def join(self, job: Job, hidden: mx.array) -> None:
        """Draw the first token of a job whose text is read, and make it a row if more may follow.

        `hidden` [1, 1, hidden] of its last token.
        """
        assert job.entries is not None
        sampler = job.sampler(self.model.config.vocab_size)
        logits = self.model.logits(hidden[:, -1])
        drawn = Drawn.of(logits, sampler(masked(logits, [job.mask])), [job])
        mx.eval(drawn.arrays())  # what fails here fails before anything is told
        drawn.teach([job])
        job.tell_started()
        ended = drawn.tell(self.model, [job])
        entries, job.entries = job.entries, None
        if not ended:
            self._entries = caches.join([self._entries, entries]) if self.jobs else entries
            self._sampler.join(BatchSampler([sampler]))
            self._inputs = mx.concatenate([self._inputs, drawn.token])
            self.jobs.append(job)

    def step(self) -> None:
        """Draw a token of each row, and tell those drawn by the step before.

        The device has the next step to work on while the tokens of this one are awaited. But where
        experts are read from files, a token is told first; and where a row must obey something, the
        next ones are drawn when what may follow is known, while the device computes their logits.

        Raises:
            RuntimeError: the device failed; what the rows hold means nothing any more.
            KimiError: the same, said.
        """
        drawn = self._drawn
        if self.model.offload is not None:
            self._drawn = None
            self._teach(drawn)
            self._tell(drawn)
            if self.jobs:
                self._queue(None)
            return
        began = time.perf_counter()
        lone = self._lone_row()
        if lone is not None and lone.propose(self._room).tokens:
            # What comes next is guessed from the latest token: the device waits for it to be known.
            self._drawn = None
            self._teach(drawn)
            self._tell(drawn)
            drawn = None
            if not self.jobs:
                return
            draft = lone.propose(self._room)
            if draft.tokens:
                self._read_draft(lone, draft)
                return
        self._queue(drawn)
        self._tell(drawn)
        if lone is not None:
            lone.speculation.took(1, time.perf_counter() - began)

    def _lone_row(self) -> LoneRow | None:
        """The one row, if there are drafts for it."""
        if self._learned is None or len(self.jobs) != 1:
            return None
        if self._lone is None or self._lone.job is not self.jobs[0]:
            self._lone = LoneRow(self.jobs[0], self._learned)
        return self._lone

    @property
    def _room(self) -> int:
        """Tokens that may be read after the latest one in the same step."""
        return caches.room(self._entries) - 1

    def _read_draft(self, lone: LoneRow, draft: Draft) -> None:
        """Read the latest token, which is told, and as many of a draft as are drawn, too.

        Each is drawn with the random numbers, and after the tokens, that it would have had one by
        one.
        """
        job, began = lone.job, time.perf_counter()
        ids, steps, before = [job.drawn[-1], *draft.tokens], list[Step](), len(job.drawn)
        logits = self.model.logits(self.model.hidden(mx.array([ids]), self._entries, steps=steps))
        draws, samplers = [], []
        for position in range(len(ids)):
            following = logits[:, position]
            token = self._sampler(masked(following, [job.mask]))
            draws.append(Drawn.of(following, token, [job]))
            samplers.append(self._sampler.copy())
            if position == len(draft.tokens) or not job.may_take(draft.tokens[position]):
                break
        mx.eval([one.arrays() for one in draws], caches.arrays(self._entries))
        drawn = [int(one.token.item()) for one in draws]  # type: ignore[arg-type]
        right = common_prefix(drawn, draft.tokens)
        is_over = job.ends_with(drawn[:right])  # (a draft goes no further than its end)
        right = right if is_over else min(right, len(draws) - 1)
        if 1 + right < len(ids):
            keep_first(self._entries, steps, 1 + right)
            mx.eval(caches.arrays(self._entries))
        if not is_over:
            job.go_back(before + right)
            self._sampler, self._drawn = samplers[right], draws[right]
            self._inputs = self._drawn.token
        lone.speculation.took(len(ids), time.perf_counter() - began)
        lone.speculation.learn(draft, right)
        self._tally.add(drafted_tokens=len(draft.tokens), accepted_tokens=right)
        ended = set[Job]()
        for one in draws[:right]:
            ended = ended or one.tell(self.model, [job])
        self._keep_those_told([job], ended)

    def _queue(self, unknown: Drawn | None) -> None:
        """Queue the next step. `unknown`: what must be known for a mask, if there is one."""
        hidden = self.model.hidden(self._inputs[:, None], self._entries)
        logits = self.model.logits(hidden[:, -1])
        if any(job.must_obey for job in self.jobs):
            mx.async_eval(logits, caches.arrays(self._entries))
            self._teach(unknown)
        allowed = masked(logits, [job.mask for job in self.jobs])
        self._drawn = Drawn.of(logits, self._sampler(allowed), self.jobs)
        self._inputs = self._drawn.token
        mx.async_eval(self._drawn.arrays(), caches.arrays(self._entries))

    def _teach(self, drawn: Drawn | None) -> None:
        if drawn is not None:
            drawn.teach(self.jobs[: drawn.token.shape[0]])

    def _tell(self, drawn: Drawn | None) -> None:
        """Tell what the first rows drew."""
        if drawn is None:
            return
        told = self.jobs[: drawn.token.shape[0]]
        self._keep_those_told(told, drawn.tell(self.model, told))

    def _keep_those_told(self, told: Sequence[Job], ended: set[Job]) -> None:
        """Keep the states of those that end, or have come far, and go on without the former."""
        for row, job in enumerate(told):
            is_due = len(job.prompt) + len(job.drawn) - job.kept >= SNAPSHOT_EVERY
            if not job.has_failed and (job in ended or is_due):
                self._keep(row)
        self.drop(ended)

    def _keep(self, row: int) -> None:
        """Give the tree the state of a row."""
        job, length = self.jobs[row], self._entries[0].lengths[row]
        alone = len(self.jobs) == 1
        entries = caches.snapshot(self._entries) if alone else caches.take(self._entries, [row])
        mx.eval(caches.arrays(entries))
        self.tree.insert(job.ids[:length], State(entries, is_answer=True))
        job.kept = length

    def drop(self, leaving: set[Job]) -> None:
        """Go on without these jobs."""
        rows = [row for row, job in enumerate(self.jobs) if job not in leaving]
        if len(rows) == len(self.jobs):
            return
        if not rows:
            self.clear()
            return
        known = 0 if self._drawn is None else self._drawn.token.shape[0]
        self.jobs = [self.jobs[row] for row in rows]
        self._entries = caches.take(self._entries, rows)
        self._sampler.take(rows)
        self._inputs = self._inputs[mx.array(rows)]
        drawn = [row for row in rows if row < known]
        self._drawn = self._drawn.take(drawn) if self._drawn and drawn else None

    def clear(self) -> list[Job]:
        """Forget all rows; the jobs they were of."""
        jobs, self.jobs, self._lone = self.jobs, [], None
        self._entries, self._sampler = [], BatchSampler([])
        self._inputs, self._drawn = mx.array([], mx.uint32), None
        return jobs
