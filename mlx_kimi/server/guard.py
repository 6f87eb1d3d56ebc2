"""What requests take of the memory, and what there is for them."""

from __future__ import annotations

import mlx.core as mx

from mlx_kimi.errors import KimiError
from mlx_kimi.loading.memory import Machine, needs
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.units import human_size

MARGIN = 16  # the share of free memory that nothing is planned for
TREE_SHARE, TREE_MOST = 4, 8 << 30  # the tree gets a quarter of the free memory, 8 GiB at most


class OutOfMemory(KimiError):
    """A request whose prompt and answer do not fit into the memory."""


class Guard:
    """Plans the memory beside the model's weights: rows, the step's work space, the prefix tree."""

    def __init__(
        self, model: KimiLinear, slice_tokens: int, latent_bits: int | None, memory: int | None
    ) -> None:
        """`memory`: bytes beside the weights; None: what is free now."""
        config = model.config
        self._needs = needs(
            config, 0, latent_bits, prefill_step=slice_tokens, context=config.model_max_length
        )
        free = free_memory() if memory is None else memory
        # Under a budget the experts' caches take what else there is: the budget left room for one.
        self._planned = model.offload is not None and memory is None
        self.memory = free - free // MARGIN if memory is None else memory

    def of(self, tokens: int) -> int:
        """Bytes of a row with so many tokens: its state before and after a step, and a third while
        rows join; its latents, and as many again while segments merge."""
        return 3 * self._needs.state + 2 * self._needs.latent * tokens

    @property
    def for_rows(self) -> int:
        """Bytes of all rows together at most."""
        return max(0, self.memory - self._needs.work)

    def check(self, prompt: int, answer: int) -> int:
        """Bytes of a request of so many tokens.

        Raises:
            OutOfMemory: it does not fit, even alone.
        """
        needed = self.of(prompt + answer)
        if needed > self.for_rows and not self._planned:
            raise OutOfMemory(
                f"a prompt of {prompt:,} tokens and an answer of {answer:,} take "
                f"{human_size(needed)} of memory but {human_size(self.for_rows)} are free for "
                "requests; a shorter prompt or max_tokens takes less"
            )
        return needed

    def fits(self, needed: int, reserved: int) -> bool:
        """Whether a row finds room beside others, which take `reserved` bytes."""
        return self._planned or not reserved or reserved + needed <= self.for_rows

    def for_tree(self, reserved: int, wanted: int | None) -> int:
        """Bytes of the prefix tree beside rows; `wanted` None: a share of all, or none under a
        budget, which names what states may take."""
        if self._planned:
            return wanted or 0
        most = min(TREE_MOST, self.memory // TREE_SHARE) if wanted is None else wanted
        return max(0, min(most, self.for_rows - reserved))


def free_memory() -> int:
    """Bytes that this process may still take for what the device computes."""
    machine = Machine.here()
    # What a Mac gives its GPU includes what this process has of it.
    return machine.limit - (mx.get_active_memory() if mx.metal.is_available() else 0)
