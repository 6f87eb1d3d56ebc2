"""What a process may take of memory, and how many experts that leaves room for."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.defaults import CONTEXT, PREFILL_STEP
from mlx_kimi.errors import KimiError
from mlx_kimi.loading.memory import ANY_SIZE, Machine, needs, non_expert_bytes
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


def slots_for(budget: Budget, config: ModelConfig, resident: int, one_slot: int) -> int:
    """How many slots a layer gets.

    Args:
        resident: bytes of all weights but the routed experts'.
        one_slot: bytes of one routed expert in every layer.

    Raises:
        KimiError: the budget is too small for a token's experts, or more than this machine has.
    """
    machine = Machine.here()
    if budget.memory > machine.limit and not os.environ.get(ANY_SIZE):
        raise KimiError(f"a memory budget of {human_size(budget.memory)} is too large: {machine}")
    context = budget.tokens(config)
    wanted = needs(config, resident, budget.latent_bits)
    fixed = non_expert_bytes(wanted, context, budget.snapshots, budget.prefill_step)
    one_slot = max(1, one_slot)  # 0 of a model without routed experts
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
