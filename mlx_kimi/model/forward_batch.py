"""What one forward pass tells every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_kimi.metal_kernels.attention import SubmitLimit
from mlx_kimi.metal_kernels.split_kv import SplitKVPlan
from mlx_kimi.offload.optimistic import Residency

if TYPE_CHECKING:
    from mlx_kimi.model.steps import Step


# Tokens of a text in one step, for each of which gates and latents are read again, and tokens in
# all, that take the kernels of one token, in a graph that is built once.
FEW, FEW_IN_ALL = 8, 16


def is_few(B: int, T: int) -> bool:
    """Whether T tokens in each of B rows take the kernels of one token."""
    return T == 1 or (T <= FEW and B * T <= FEW_IN_ALL)


def rows_of(given: mx.array) -> tuple[int, int]:
    """B and T of ids [B, T], or of x and residual [2, B, T, hidden]."""
    B, T = given.shape if given.ndim == 2 else given.shape[1:3]
    return B, T


@dataclass(frozen=True)
class ForwardBatch:
    """What all layers are told of the tokens [B, T] of one forward pass."""

    counts: Sequence[int] | None = None  # [B], the valid ones of T tokens; the rest is padding on
    lengths: mx.array | None = None  # the right; the same as an array of int32. None: all
    plan: SplitKVPlan | None = None  # how MLA divides the cache for one token; None: layers do
    # Queues the halves of layers, and the blocks of MLA, as they are built. None: no halves are
    # queued, and each MLA layer limits its own blocks.
    submit_limit: SubmitLimit | None = None
    residency: Residency | None = None  # the assumed slots of experts, in a graph
    steps: list[Step] | None = None  # a layer adds how to go back within this pass; None: none does
    _zeros: dict[tuple[tuple[int, ...], mx.Dtype], mx.array] = field(default_factory=dict)

    @staticmethod
    def padded(lengths: Sequence[int]) -> ForwardBatch:
        """Rows of tokens, of which the first `lengths` [B] are valid."""
        return ForwardBatch(tuple(lengths), mx.array(list(lengths)))

    def zeros(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """What layers start from before the first token: one array for all of them."""
        if (shape, dtype) not in self._zeros:
            self._zeros[shape, dtype] = mx.zeros(shape, dtype)
        return self._zeros[shape, dtype]

    def submit(self, *results: mx.array) -> None:
        """Let the device begin these, alone or with later ones, if `submit_limit` says so."""
        if self.submit_limit is not None:
            self.submit_limit.gather(*results)
