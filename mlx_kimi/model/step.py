"""What all layers are told of the tokens that they read together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_kimi.metal_kernels.attention import SubmitLimit
from mlx_kimi.metal_kernels.split_kv import SplitKVPlan


@dataclass(frozen=True)
class ForwardBatch:
    """What all layers are told of the tokens that they read together."""

    real: mx.array | None = None  # [B, T] bool, of a right-padded batch; None: no padding
    lengths: mx.array | None = None  # [B], the real tokens of each row; None: all T
    plan: SplitKVPlan | None = None  # of one token's attention; None: each layer makes its own
    ahead: SubmitLimit | None = None  # of many tokens; None: no limit

    @staticmethod
    def padded(T: int, lengths: Sequence[int]) -> ForwardBatch:
        counts = mx.array(list(lengths))
        return ForwardBatch(mx.arange(T) < counts[:, None], counts)

    def submit(self, *results: mx.array) -> None:
        if self.ahead is not None:
            self.ahead.submit(*results)
