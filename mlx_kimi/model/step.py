"""What all layers are told of the tokens that one step reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_kimi.metal_kernels.attention import SubmitLimit
from mlx_kimi.metal_kernels.split_kv import SplitKVPlan
from mlx_kimi.offload.optimistic import Residency


@dataclass(frozen=True)
class ForwardBatch:
    """What all layers are told of the tokens [B, T] that one step reads."""

    valid: mx.array | None = None  # [B, T] bool, of a right-padded batch; None: no padding
    lengths: mx.array | None = None  # [B], the valid tokens of each row; None: all T
    plan: SplitKVPlan | None = None  # of one token's attention; None: each layer makes its own
    submit_limit: SubmitLimit | None = None  # of many tokens; None: nothing is submitted early
    residency: Residency | None = None  # where a graph takes experts to be; None: layers look

    @staticmethod
    def padded(T: int, lengths: Sequence[int]) -> ForwardBatch:
        """Rows of T tokens, of which the first `lengths` [B] are valid."""
        counts = mx.array(list(lengths))
        return ForwardBatch(mx.arange(T) < counts[:, None], counts)

    def submit(self, *results: mx.array) -> None:
        """Let the device begin these, where this step has a `submit_limit`."""
        if self.submit_limit is not None:
            self.submit_limit.submit(*results)
