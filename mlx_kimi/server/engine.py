"""One thread that owns MLX, the model and all states, and answers requests of token ids."""

from __future__ import annotations

import logging
import time
from collections import deque
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from threading import Condition, Thread
from typing import Literal

import mlx.core as mx

from mlx_kimi.defaults import PREFILL_STEP
from mlx_kimi.errors import GpuLost, KimiError, in_words
from mlx_kimi.generation.decode import check_prefill_step
from mlx_kimi.generation.drafts import Learned
from mlx_kimi.generation.faults import leave_out_what_failed
from mlx_kimi.generation.generate import check_ids, check_lengths
from mlx_kimi.generation.speculate import Speculate
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.model.cache import check_latent_bits
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.server.batch import Batch
from mlx_kimi.server.guard import Guard, OutOfMemory
from mlx_kimi.server.job import Job, Tally
from mlx_kimi.server.prefill import APART, Prefill, measured_slice
from mlx_kimi.server.prefix_tree import PrefixTree
from mlx_kimi.server.state_store import StateStore
from mlx_kimi.server.ticket import (
    Event,
    Failed,
    Finished,
    Progress,
    Reason,
    Request,
    Started,
    Ticket,
    Token,
)
from mlx_kimi.server.turns import Turns

__all__ = [
    "Counters",
    "Engine",
    "Event",
    "Failed",
    "Finished",
    "OutOfMemory",
    "Progress",
    "QueueFull",
    "Reason",
    "Request",
    "Started",
    "Status",
    "Ticket",
    "Token",
]

QUEUE_LIMIT = 256  # requests that wait
ROWS = 16  # requests that are read or answered at a time
LONGEST_RETRY = 60  # seconds
# After a slice of a prompt that took a second, running answers have this many for their steps.
DECODE_SHARE = 0.25
TURN_SECONDS = 1.0  # of a client's prompt, before another's
GRACE = 10  # seconds in which a cancelled request must have ended
State = Literal["starting", "ready", "stopping", "stopped", "failed"]
_log = logging.getLogger(__name__)


class QueueFull(KimiError):
    """As many requests wait as may. `retry_after`: seconds until it is worth asking again."""

    def __init__(self, limit: int, retry_after: int) -> None:
        super().__init__(f"{limit:,} requests wait already; ask again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Counters:
    """Sums since the start, over all requests."""

    submitted: int = 0
    refused: int = 0  # the queue was full, or the request could never be answered
    stopped: int = 0  # finished with "stop"
    length: int = 0  # finished with "length"
    cancelled: int = 0
    failed: int = 0
    milliseconds: int = 0  # of all that ended, since each one's turn came
    prompt_tokens: int = 0  # of requests that started, as their `Started` says
    cached_tokens: int = 0  # of these, those that the prefix tree held
    read_tokens: int = 0  # of prompts, by the model
    generated_tokens: int = 0  # each a `Token`
    drafted_tokens: int = 0  # that were guessed
    accepted_tokens: int = 0  # of these, that were drawn
    evicted: int = 0  # states that the prefix tree gave up for memory


@dataclass(frozen=True)
class Status:
    """The engine at one moment."""

    state: State
    failure: str | None  # why it is "failed"
    prefill_slice: int  # prompt tokens that are read between decode steps; 0: not measured yet
    queued: int  # requests that wait
    reading: int  # whose prompts are being read
    decoding: int  # that are being answered
    tree_states: int  # that the prefix tree holds
    tree_bytes: int
    tree_memory: int  # bytes that it may hold now
    counters: Counters = field(default_factory=Counters)
    disk_bytes: int = 0  # of the states that are stored


class Engine:
    """Answers requests of token ids with one model, in a thread of its own."""

    def __init__(
        self,
        model: KimiLinear,
        *,
        queue_limit: int = QUEUE_LIMIT,
        rows: int = ROWS,
        tree_memory: int | None = None,
        prefill_slice: int | None = None,
        latent_bits: int | None = None,
        memory: int | None = None,
        store: StateStore | None = None,
        speculate: Speculate = "off",
    ) -> None:
        """Nothing runs before `start`.

        Args:
            queue_limit: requests that may wait.
            rows: requests that are read or answered at a time; one under a memory budget, and of a
                model that takes one text at a time.
            tree_memory: bytes of the prefix tree; None: a quarter of `memory`, 8 GiB at most.
            prefill_slice: prompt tokens read between decode steps; None: measured at the start.
            latent_bits: of `KimiLinear.make_cache`.
            memory: bytes that requests and the tree may take; None: what is free now.
            store: keeps states on the disk; the engine closes it when it stops.
            speculate: "auto" reads drafts from the text itself in the step of an answer that runs
                alone. Not under a memory budget, and not of a model that takes one text at a time.

        Raises:
            OptionError: `prefill_slice` or `latent_bits` is out of range.
        """
        check_latent_bits(latent_bits)
        if prefill_slice is not None:
            check_prefill_step(prefill_slice, "prefill_slice")
            if model.offload is not None:
                prefill_slice = min(prefill_slice, model.offload.prefill_step)
        self.model = model
        self._queue_limit, self._latent_bits = queue_limit, latent_bits
        takes_many = model.offload is None and not model.one_text
        self._rows = rows if takes_many else 1
        self._tree_memory, self._slice = tree_memory, prefill_slice or 0
        self._guard = Guard(model, self._slice or PREFILL_STEP, latent_bits, memory)
        self._tally = Tally()
        self._store = store
        self._tree = PrefixTree(self._guard.for_tree(0, tree_memory), store)
        self._prefill = Prefill(model, self._tree, self._tally, self._slice, latent_bits)
        learned = Learned() if speculate == "auto" and takes_many else None
        self._batch = Batch(model, self._tree, self._tally, learned)
        self._turns = Turns()
        self._waiting = self._reading = 0  # of the jobs in `_turns`
        self._owed = 0.0  # seconds of decode steps before the next slice
        self._reads: Job | None = None  # whose turn it is to be read
        self._turn_left = 0.0  # seconds
        self._changed = Condition()  # guards what follows
        self._new: deque[Job] = deque()
        self._tickets: list[Ticket] = []  # whose last event has not come
        self._state: State = "starting"
        self._failure: str | None = None
        run = partial(copy_context().run, self._run)  # what runs kernels here runs them there
        self._thread = Thread(target=run, name="engine", daemon=True)

    def know(self, state: TokenState) -> None:
        """Let requests go on from the end of what `state` has read. Before `start`."""
        self._prefill.know(state.ids, state.entries)

    # --------------------------------------------------------------------------- from any thread
    def start(self) -> None:
        """Start the thread; requests may have been submitted before."""
        self._thread.start()

    def stop(self, patience: float) -> None:
        """Take no more requests, let those that are here finish for `patience` seconds, cancel the
        rest, and end the thread."""
        with self._changed:
            if self._state in ("starting", "ready"):
                self._state = "stopping"
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(patience)
            for ticket in self._tickets:
                ticket.cancel()
            self._thread.join(GRACE)
        self._end("stopped", None)
        if self._store is not None:
            self._store.close()

    def submit(self, request: Request) -> Ticket:
        """Queue a request.

        Raises:
            QueueFull: too many wait.
            ContextFull: the prompt fills the model's context.
            OutOfMemory: prompt and answer do not fit into the memory.
            KimiError: the prompt is empty or has ids that the model does not know, `max_tokens` is
                below 1, or the engine has stopped or failed.
        """
        try:
            return self._submit(request)
        except KimiError:
            self._tally.add(refused=1)
            raise

    def _submit(self, request: Request) -> Ticket:
        check_ids(self.model, request.ids)
        check_lengths(request.max_tokens, PREFILL_STEP)
        prompt = len(request.ids)
        limit = min(request.max_tokens, self.model.config.model_max_length - prompt)
        ticket = Ticket(request, self._wake)
        job = Job(ticket, limit, self._guard.check(prompt, limit), self._tally)
        with self._changed:
            if self._state not in ("starting", "ready"):
                raise KimiError(self._failure or "the server is stopping")
            if self._queued >= self._queue_limit:
                raise QueueFull(self._queue_limit, self._retry_after())
            self._tally.add(submitted=1)
            self._new.append(job)
            self._tickets.append(ticket)
            self._changed.notify_all()
        return ticket

    @property
    def _queued(self) -> int:
        return len(self._new) + self._waiting

    def _retry_after(self) -> int:
        """Seconds in which those that wait may have been answered, as long as others took."""
        sums = self._tally.sums()
        ended = sum(sums.get(name, 0) for name in ("stopped", "length", "cancelled", "failed"))
        mean = sums.get("milliseconds", 0) / 1000 / max(1, ended)
        return min(LONGEST_RETRY, max(1, round(self._queued * mean / self._rows)))

    def status(self) -> Status:
        """The engine at this moment. Never waits for a step of the model."""
        tree = self._tree
        return Status(
            self._state,
            self._failure,
            self._slice,
            self._queued,
            self._reading,
            len(self._batch.jobs),
            tree.states,
            tree.bytes,
            tree.memory,
            Counters(**self._tally.sums(), evicted=tree.evicted),
            0 if self._store is None else self._store.bytes,
        )

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # --------------------------------------------------------------------------- the engine's own
    def _run(self) -> None:
        try:
            if not self._slice:
                self._slice = measured_slice(self.model, self._latent_bits)
                self._prefill.slice_tokens = self._slice
            with self._changed:
                if self._state == "starting":
                    self._state = "ready"
            while self._take_in():
                self._work()
        except BaseException as error:
            _log.exception("the engine's thread ended")
            self._end("failed", f"the engine failed: {in_words(error)}")  # type: ignore[arg-type]
        else:
            self._end("stopped", None)
        finally:
            mx.clear_streams()  # of this thread: on NVIDIA GPUs the program would abort at its end

    def _end(self, state: State, failure: str | None) -> None:
        with self._changed:
            if self._state not in ("stopped", "failed"):
                self._state, self._failure = state, failure
            said = self._failure or "the server has stopped"
            tickets, self._tickets = self._tickets, []
        for ticket in tickets:
            if not ticket.is_closed:
                self._tally.add(failed=1)
                ticket.put(Failed(KimiError(said)))

    def _take_in(self) -> bool:
        """Take new requests, and wait for one where there is nothing to do; False: it is over."""
        with self._changed:
            self._tickets = [ticket for ticket in self._tickets if not ticket.is_closed]
            self._count_places()
            if not (self._turns or self._batch.jobs):
                self._changed.wait_for(lambda: self._new or self._state != "ready")
            while self._new:
                self._turns.add(self._new.popleft())
            self._count_places()
            return bool(self._turns or self._batch.jobs)

    def _count_places(self) -> None:
        """For other threads, which do not look into what this one changes."""
        self._reading = sum(job.entries is not None for job in self._turns)
        self._waiting = len(self._turns) - self._reading

    def _work(self) -> None:
        """A step of all running answers, and a slice of a prompt if it is time for one."""
        self._drop_cancelled()
        if self._batch.jobs:
            began = time.perf_counter()
            self._decode()
            self._owed -= time.perf_counter() - began
        if not self._batch.jobs or self._owed <= 0:
            began = time.perf_counter()
            self._read()
            took = time.perf_counter() - began
            self._owed, self._turn_left = DECODE_SHARE * took, self._turn_left - took

    def _drop_cancelled(self) -> None:
        for job in self._turns:
            if job.ticket.is_cancelled:
                if job.entries is not None and job.read - job.kept >= APART:
                    self._prefill.keep(job)  # who asks again goes on from here
                self._turns.remove(job)
                job.finish("cancelled")
        gone = {job for job in self._batch.jobs if job.ticket.is_cancelled}
        self._batch.drop(gone)
        for job in gone:
            job.finish("cancelled")

    def _decode(self) -> None:
        try:
            self._batch.step()
        except GpuLost:
            raise
        except (KimiError, RuntimeError) as error:
            self._recover(error)

    def _recover(self, error: Exception) -> None:
        """A step failed. Texts are read again, but for that which is too much for the memory."""
        jobs = [job for job in self._batch.clear() if not job.ticket.is_closed]
        failed, why = self._lost_by(error, jobs)
        for job in jobs:
            if job in failed:
                job.fail(why)
            else:
                job.begin_again()
                self._turns.add(job)

    def _lost_by(self, error: Exception, jobs: list[Job]) -> tuple[list[Job], KimiError]:
        """Whose answer ends by an error of work for these jobs, and what they are told.

        Raises:
            GpuLost: nothing can run any more.
        """
        try:
            if not isinstance(error, RuntimeError):
                raise error
            leave_out_what_failed(self.model, error)
        except GpuLost:
            raise
        except KimiError as why:  # of the memory, or of files with experts
            self._tree.clear(self._tree.bytes // 2)
            mx.clear_cache()
            return jobs[-1:], why
        except RuntimeError as why:
            return jobs, KimiError(in_words(why))
        return [], KimiError("")

    def _read(self) -> None:
        """A slice of the prompt whose turn it is."""
        if self._reads not in self._turns or self._turn_left <= 0:
            self._reads, self._turn_left = self._next(), TURN_SECONDS
        job = self._reads
        if job is None:
            return
        try:
            if job.entries is None:
                reserved = self._reserved + job.memory
                writing = 0 if self._store is None else self._store.waiting
                room = self._guard.for_tree(reserved, self._tree_memory) - writing
                self._tree.memory = max(0, room)
                self._tree.fit()
                self._prefill.begin(job)
            job.hidden = self._prefill.read_slice(job)
            if job.hidden is not None:
                self._batch.join(job, job.hidden)
                self._turns.remove(job)
                self._reads = None
        except GpuLost:
            raise
        except (KimiError, RuntimeError) as error:
            failed, why = self._lost_by(error, [job])
            if failed:
                self._turns.remove(job)
                job.fail(why)

    def _next(self) -> Job | None:
        """The job whose turn it is to be read, of those that have a place or find one."""
        running = [job for job in self._turns if job.entries is not None]
        is_full = len(running) + len(self._batch.jobs) >= self._rows

        def may_run(job: Job) -> bool:
            nonlocal is_full
            if job.entries is not None:
                return True
            # Who does not fit is waited for: else smaller ones would always go before it.
            is_full = is_full or not self._guard.fits(job.memory, self._reserved)
            return not is_full and not self._prefill.should_wait(job, running)

        return self._turns.next(may_run)

    @property
    def _reserved(self) -> int:
        """Bytes of the requests that have a place."""
        running = (job for job in self._turns if job.entries is not None)
        return sum(job.memory for job in (*running, *self._batch.jobs))
