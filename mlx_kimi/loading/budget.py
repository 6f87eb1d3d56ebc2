"""What a process may take of memory, and how many experts that leaves room for."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.defaults import CONTEXT, PREFILL_STEP
from mlx_kimi.errors import KimiError
from mlx_kimi.loading.memory import ANY_SIZE, Machine, MemoryEstimate, needs, non_expert_bytes
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


def work_for(budget: Budget, config: ModelConfig, resident: int, slots: int) -> MemoryEstimate:
    """What a model takes that runs in a budget, beside its routed experts.

    Args:
        resident: bytes of all weights but those experts'.
        slots: of each layer.
    """
    context, step = budget.tokens(config), budget.prefill_step
    return needs(
        config, resident, budget.latent_bits, prefill_step=step, context=context, slots=slots
    )


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
    one_slot = max(1, one_slot)  # 0 of a model without routed experts
    step = min(budget.prefill_step, context)

    def fixed(slots: int) -> int:
        wanted = work_for(budget, config, resident, slots)
        return reading + non_expert_bytes(wanted, context, budget.snapshots, loading)

    least = min(config.num_experts, config.num_experts_per_token)
    slots = min(config.num_experts, (budget.memory - fixed(least)) // one_slot)
    while slots >= least and fixed(slots) + slots * one_slot > budget.memory:
        slots -= 1
    if slots < least:
        beside, experts = fixed(least), least * one_slot
        needed = -(-(beside + experts) // 10**6) + 1
        smaller = "; a smaller --context, or fewer tokens read at once, need less"
        raise KimiError(
            f"a memory budget of {human_size(budget.memory)} is too small: {human_size(beside)} "
            f"for all but the routed experts, {context:,} tokens of context and {step:,} read at "
            f"once, and {human_size(experts)} for the {least} experts a token in each layer, make "
            f"{needed:,} MB{smaller}"
        )
    return slots
