"""The routed experts of one layer that are in memory: slots, filled from the files on demand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_kimi.checkpoint.weight_file import Bytes
from mlx_kimi.errors import KimiError
from mlx_kimi.offload.expert_files import ExpertStack
from mlx_kimi.offload.lrfu import LRFU
from mlx_kimi.offload.read_pool import ReadPool
from mlx_kimi.offload.stats import Counts

WAVE = 16  # experts that are read together while those before them compute
EMPTY = -1


class ExpertCache:
    """Slots that hold experts of one layer; `arrays` are stacks of them for the expert kernels.

    The arrays' own memory is written into. That is right only while no step that was submitted
    may still read the slot: `slot_ids` and `for_each_expert` say how each of them makes sure.
    """

    def __init__(
        self,
        stacks: Sequence[ExpertStack],
        slots: int,
        readers: ReadPool,
        counts: Counts,
        slot_table: npt.NDArray[np.int64],
        scores: npt.NDArray[np.float64],
    ) -> None:
        """`slots` of them, at least as many as a token has experts.

        slot_table, scores: [experts], this layer's rows of two tables of the whole model.
        `slot_table` is expert -> slot, or EMPTY.
        """
        self.stacks, self.readers, self.counts = stacks, readers, counts
        self.slot_table, self.lrfu = slot_table, LRFU(scores)
        self.expert_in = np.full(slots, EMPTY)
        self.arrays: dict[str, mx.array] = {}
        self._views: list[Bytes] = []
        self._reads: list[Future[int]] = []
        for stack in stacks:
            array, view = _writable(stack, slots)
            self.arrays[stack.name] = array
            self._views.append(view)
        self._what = stacks[0].name.rsplit(".", 2)[0].removesuffix(".mlp.switch_mlp")

    @property
    def slots(self) -> int:
        return len(self.expert_in)

    @property
    def holds_all(self) -> bool:
        """Whether every expert has a slot of its own."""
        return self.slots == len(self.slot_table)

    def fill(self) -> None:
        """Read every expert, where there is a slot for each."""
        self._finish(self._start(np.arange(self.slots), needed=np.arange(0)), Counts())

    # ---------------------------------------------------------------------------- a few tokens
    def slot_ids(self, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Experts of one token [k] or a few [tokens, k], which have room together -> the slots that
        hold them, read if they must be.

        It is safe to overwrite slots here: `chosen` was read back from the device, which works in
        order, so all that was queued before the router is done, earlier reads of slots included.
        Between two calls for one router, what the first was for must be done.
        """
        self.lrfu.note(np.atleast_2d(chosen))
        needed = np.array(list(dict.fromkeys(chosen.reshape(-1).tolist())))
        absent = needed[self.slot_table[needed] == EMPTY]
        self.counts.lookups += len(needed)
        if len(absent):
            self._finish(self._start(absent, needed=needed), self.counts)
        return self.slot_table[chosen]

    def with_room(self, chosen: npt.NDArray[np.int64]) -> Iterator[slice]:
        """Neighbouring tokens of `chosen` [tokens, k] whose experts have slots at the same time."""
        start, experts = 0, set[int]()
        for token, own in enumerate(chosen.tolist()):
            if len(experts.union(own)) > self.slots:
                yield slice(start, token)
                start, experts = token, set()
            experts.update(own)
        yield slice(start, len(chosen))

    # ---------------------------------------------------------------------------- many tokens
    def for_each_expert(
        self,
        chosen: npt.NDArray[np.int64],
        compute: Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], mx.array],
    ) -> tuple[list[int], list[mx.array]]:
        """`compute(experts, slots)` for all experts that many tokens chose [tokens, k], in waves.

        Those in memory come first, then waves of others: one is read while the one before it
        computes. The most worth is read last, so that it stays. A slot is written only once what
        was computed from it is there. The experts of a wave are in the order of their slots.

        Returns:
            The experts in the order they were visited, and what was computed for each wave.
        """
        self.lrfu.note(chosen)
        needed = np.unique(chosen)
        present = needed[self.slot_table[needed] != EMPTY]
        absent = needed[self.slot_table[needed] == EMPTY]
        absent = absent[np.argsort(self.lrfu.scores[absent], kind="stable")]
        self.counts.lookups += len(needed)
        visited: list[int] = []
        outputs: list[mx.array] = []
        from_slot: dict[int, mx.array] = {}

        def submit(experts: npt.NDArray[np.int64]) -> None:
            experts = experts[np.argsort(self.slot_table[experts])]
            slots = self.slot_table[experts]
            outputs.append(compute(experts, slots))
            visited.extend(experts.tolist())
            from_slot.update(dict.fromkeys(slots.tolist(), outputs[-1]))
            mx.async_eval(outputs[-1])

        size = max(1, min(WAVE, self.slots // 2))
        for start in range(0, len(present), size):  # (a slot is written when its wave is computed)
            submit(present[start : start + size])
        waves = [absent[i : i + size] for i in range(0, len(absent), size)]
        wave: npt.NDArray[np.int64] = absent[:0]
        for following in waves:
            started = self._start(following, needed=wave, from_slot=from_slot)
            self._finish(started, self.counts)
            wave = following
            submit(wave)
        return visited, outputs

    # ---------------------------------------------------------------------------- slots
    def _start(
        self,
        experts: npt.NDArray[np.int64],
        needed: npt.NDArray[np.int64],
        from_slot: dict[int, mx.array] | None = None,
    ) -> list[tuple[int, int, list[Future[int]]]]:
        """Begin to read `experts` into the slots worth least, but none of what is `needed`."""
        self.readers.settle(self._reads)  # (of a step that failed or was interrupted)
        slots = self._slots_to_fill(len(experts), needed)
        if from_slot:
            mx.eval([from_slot.pop(slot) for slot in slots if slot in from_slot])
        started = []
        for expert, slot in zip(experts.tolist(), slots, strict=True):
            if self.expert_in[slot] != EMPTY:  # if reading fails, the slot holds nothing
                self.slot_table[self.expert_in[slot]] = EMPTY
                self.expert_in[slot] = EMPTY
            reads = [
                self.readers.start(partial(stack.read, expert, view[slot]), self._reads)
                for stack, view in zip(self.stacks, self._views, strict=True)
            ]
            started.append((expert, slot, reads))
        return started

    def _finish(
        self, started: Sequence[tuple[int, int, list[Future[int]]]], counts: Counts
    ) -> None:
        """Wait for what `_start` began; from then on the slots hold the experts."""
        began = time.perf_counter()
        for expert, slot, reads in started:
            what = f"{self._what}: expert {expert}"
            counts.bytes_read += self.readers.wait(reads, what)
            self.slot_table[expert], self.expert_in[slot] = slot, expert
        self._reads.clear()
        counts.misses += len(started)
        counts.stall_time += time.perf_counter() - began

    def _slots_to_fill(self, count: int, needed: npt.NDArray[np.int64]) -> list[int]:
        """The slots whose experts are worth least, empty ones first, and none of what is needed."""
        scores = np.where(self.expert_in == EMPTY, -1.0, self.lrfu.scores[self.expert_in])
        kept = self.slot_table[needed]
        scores[kept[kept != EMPTY]] = np.inf
        return np.argsort(scores, kind="stable")[:count].tolist()


def _writable(stack: ExpertStack, slots: int) -> tuple[mx.array, Bytes]:
    """A stack [slots, ...] of zeros, and its memory [slots, bytes].

    Raises:
        KimiError: this backend keeps arrays where the host cannot write.
    """
    base = mx.zeros((slots, stack.nbytes), mx.uint8)
    mx.eval(base)
    view = np.array(base, copy=False)
    array = base.view(stack.dtype).reshape(slots, *stack.shape)
    mx.eval(array)
    view[-1, -1] = 1
    if array.view(mx.uint8).reshape(-1)[-1].item() != 1:
        raise KimiError("this device's arrays cannot be written by the host: no memory budget")
    view[-1, -1] = 0
    return array, view
