"""What a user is told of a model whose logits are NaN or infinity."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_kimi.errors import KimiError
from mlx_kimi.model.kimi_linear import KimiLinear

DIAGNOSED = 64  # tokens of a text that are read again to say where its logits went wrong


def not_finite(model: KimiLinear, ids: Sequence[int]) -> KimiError:
    """The error of logits that are NaN or infinity after the tokens `ids`.

    A short run finds the layer, if it is one's weights.
    """
    place = model.first_not_finite(mx.array([list(ids[-DIAGNOSED:])]))
    where = f"{place} is the first to give such values" if place else "this text leads to it"
    return KimiError(
        f"the model's logits are NaN or infinity after {len(ids):,} tokens: {where}; "
        "its weights are damaged or its dtype is too narrow"
    )
