"""A model of the 48B's shape with random 4-bit weights, for this program and for mlx-lm alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn

from mlx_kimi.evaluation.random_model import PUBLISHED_48B
from mlx_kimi.metal_kernels import cuda
from mlx_kimi.model.random_weights import Arrays

CONFIG: dict[str, Any] = PUBLISHED_48B | {
    "dtype": "bfloat16",
    "quantization": {"group_size": 64, "bits": 4},
}


def peer_model(config: dict[str, Any], arrays: Arrays) -> Any:
    """mlx-lm's model of the same arrays. Import it within `peer_kernels` to have its kernels."""
    from mlx_lm.models import kimi_linear as peer

    model = peer.Model(peer.ModelArgs.from_dict(config))
    if "quantization" in config:
        nn.quantize(
            model,
            **config["quantization"],
            class_predicate=lambda path, _: f"{path}.scales" in arrays,
        )
    model.load_weights(list(arrays.items()))
    model.eval()
    mx.eval(model.parameters())
    return model


@contextmanager
def peer_kernels() -> Iterator[None]:
    """On an NVIDIA GPU, mlx-lm's Metal kernels through the dialect.

    Without, it runs its delta rule as a loop in Python there, which says nothing about a Mac.
    """
    if not mx.cuda.is_available():
        yield
        return
    with (
        patch.object(mx.fast, "metal_kernel", cuda.metal_kernel),
        patch.object(mx.metal, "is_available", lambda: True),
    ):
        yield
