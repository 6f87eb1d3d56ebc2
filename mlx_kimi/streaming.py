"""A model in less memory than it has weights: routed experts come from the files on demand."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_kimi.assumption import Assumption
from mlx_kimi.bank import EMPTY, Bank, Counts
from mlx_kimi.config import ModelConfig
from mlx_kimi.errors import KimiError
from mlx_kimi.expert_files import ExpertFiles, Part
from mlx_kimi.generate import PREFILL_STEP
from mlx_kimi.memory import ANY_SIZE, BUFFERS, CONTEXT, Machine, beside_experts, human_size, needs
from mlx_kimi.readers import Readers


@dataclass(frozen=True)
class Budget:
    """What the whole process may take, in bytes, with a text of so many tokens at most."""

    memory: int
    context: int | None = None  # None: CONTEXT, or the model's if that is shorter
    latent_bits: int | None = None
    snapshots: int = 0  # bytes of states to go back to, of `Context`
    prefill_step: int = PREFILL_STEP

    def tokens(self, config: ModelConfig) -> int:
        """The longest text."""
        most = config.model_max_length
        return min(most, CONTEXT) if self.context is None else min(most, self.context)


class Streaming:
    """The banks of all layers, the threads that fill them, and what that has cost.

    Attributes:
        bounds_context: whether the budget, and not the model, says how long a text may be.
        banks: by the path of the stacks, `model.layers.3.mlp.switch_mlp`.
        slots: of each bank.
        assumption: that a token's experts are in memory, where not all are.
    """

    def __init__(
        self,
        files: ExpertFiles,
        layers: Mapping[str, list[Part]],
        slots: int,
        bounds_context: bool = False,
    ) -> None:
        self.bounds_context = bounds_context
        self.slots, self.counts, self.readers = slots, Counts(), Readers()
        weakref.finalize(self, _close, files, self.readers)
        FEW_BUFFERS.while_alive(self)
        experts = max((len(p.places) for parts in layers.values() for p in parts), default=0)
        slot_of = np.full((len(layers), experts), EMPTY)
        worth = np.zeros((len(layers), experts))
        self.banks = {
            path: Bank(parts, slots, self.readers, self.counts, *rows)
            for (path, parts), *rows in zip(layers.items(), slot_of, worth, strict=True)
        }
        for bank in self.banks.values():
            if bank.holds_all:
                bank.fill()
        partial = [bank for bank in self.banks.values() if not bank.holds_all]
        self.assumption = Assumption(partial, self.counts, slot_of, worth)

    @property
    def arrays(self) -> dict[str, mx.array]:
        """The stacks of all banks by their names in the MLX layout."""
        return {name: array for bank in self.banks.values() for name, array in bank.arrays.items()}


def slots_for(
    budget: Budget, config: ModelConfig, resident: int, layers: Mapping[str, list[Part]]
) -> int:
    """How many slots a layer gets.

    Args:
        resident: bytes of all weights but the routed experts'.

    Raises:
        KimiError: the budget is too small for a token's experts, or more than this machine has.
    """
    machine = Machine.here()
    if budget.memory > machine.limit and not os.environ.get(ANY_SIZE):
        raise KimiError(f"a memory budget of {human_size(budget.memory)} is too large: {machine}")
    context = budget.tokens(config)
    wanted = needs(config, resident, budget.latent_bits)
    fixed = beside_experts(wanted, context, budget.snapshots, budget.prefill_step)
    # In every layer; 1 of a model without routed experts.
    one_slot = max(1, sum(part.nbytes for parts in layers.values() for part in parts))
    slots = min(config.num_experts, (budget.memory - fixed) // one_slot)
    least = min(config.num_experts, config.num_experts_per_token)
    if slots < least:
        raise KimiError(
            f"a memory budget of {human_size(budget.memory)} is too small: {human_size(fixed)} for "
            f"all but the routed experts and {context:,} tokens of context, and "
            f"{human_size(least * one_slot)} for the {least} experts a token in each layer, make "
            f"{human_size(fixed + least * one_slot + 10**7)}"  # (rounded up)
        )
    return slots


class FewBuffers:
    """MLX keeps `BUFFERS` at most of freed arrays while any of some objects lives."""

    def __init__(self) -> None:
        self._alive = self._before = 0

    def while_alive(self, owner: object) -> None:
        if not self._alive:
            self._before = mx.set_cache_limit(BUFFERS)
        self._alive += 1
        weakref.finalize(owner, self._one_less)

    def _one_less(self) -> None:
        self._alive -= 1
        if not self._alive:
            mx.set_cache_limit(self._before)


FEW_BUFFERS = FewBuffers()  # the limit is the process's


def _close(files: ExpertFiles, readers: Readers) -> None:
    readers.close()
    files.close()
