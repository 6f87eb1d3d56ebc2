"""What a process may take of memory, and how many experts that leaves room for."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.defaults import CONTEXT, PREFILL_STEP
from mlx_kimi.errors import KimiError
from mlx_kimi.loading.memory import (
    ANY_SIZE,
    Machine,
    MemoryEstimate,
    needs,
    non_expert_bytes,
    wave_bytes,
)
from mlx_kimi.units import human_size


@dataclass(frozen=True)
class Budget:
    """What the whole process may take, in bytes, with a text of so many tokens at most."""

    memory: int
    context: int | None = None  # None: CONTEXT, or the model's if that is shorter
    latent_bits: int | None = None
    snapshots: int = 0  # bytes of states to go back to, of `TokenState`
    prefill_step: int = PREFILL_STEP

    def tokens(self, config: ModelConfig) -> int:
        """The longest text."""
        most = config.model_max_length
        return min(most, CONTEXT) if self.context is None else min(most, self.context)


def work_for(budget: Budget, config: ModelConfig, resident: int) -> MemoryEstimate:
    """What a model takes that runs in a budget, beside its routed experts.

    Args:
        resident: bytes of all weights but those experts'.
    """
    context, step = budget.tokens(config), budget.prefill_step
    return needs(config, resident, budget.latent_bits, prefill_step=step, context=context)


def slots_for(
    budget: Budget,
    config: ModelConfig,
    resident: int,
    one_slot: int,
    reading: int = 0,
    loading: int = 0,
) -> int:
    """How many slots a layer gets.

    Args:
        resident: as of `work_for`.
        one_slot: bytes of one routed expert in every layer.
        reading: bytes that it takes to read such experts.
        loading: bytes that it takes to read all else, before the model runs.

    Raises:
        KimiError: the budget is too small for a token's experts, or more than this machine has.
    """
    machine = Machine.here()
    if budget.memory > machine.limit and not os.environ.get(ANY_SIZE):
        raise KimiError(f"a memory budget of {human_size(budget.memory)} is too large: {machine}")
    context = budget.tokens(config)
    fixed = reading + non_expert_bytes(
        work_for(budget, config, resident), context, budget.snapshots, loading
    )
    one_slot = max(1, one_slot)  # 0 of a model without routed experts
    step = min(budget.prefill_step, context)

    def taken(slots: int) -> int:
        return fixed + slots * one_slot + wave_bytes(config, slots, step)

    least = min(config.num_experts, config.num_experts_per_token)
    slots = min(config.num_experts, (budget.memory - fixed) // one_slot)
    while slots >= least and taken(slots) > budget.memory:
        slots -= 1
    if slots < least:
        needed = -(-taken(least) // 10**6) + 1
        smaller = "; a smaller --context or --prefill-step needs less"
        raise KimiError(
            f"a memory budget of {human_size(budget.memory)} is too small: {human_size(fixed)} for "
            f"all but the routed experts, {context:,} tokens of context and "
            f"{step:,} read at once, and {human_size(taken(least) - fixed)} for the {least} "
            f"experts a token in each layer, make {needed:,} MB{smaller}"
        )
    return slots
