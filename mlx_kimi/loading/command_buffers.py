"""Larger Metal command buffers than MLX's own, which each expert launch of the 48B would end.

`docs/kernels.md` says why. `benchmarks/command_buffers.py` has MLX's rule, and counts by it.
"""

from __future__ import annotations

import os

import mlx.core as mx

OPERATIONS = 1000  # launches: a token of the 48B is 237
MEGABYTES = 100_000  # of 2^20 elements, whatever their dtype: twice the weights of the 48B
_VARIABLES = {"MLX_MAX_OPS_PER_BUFFER": OPERATIONS, "MLX_MAX_MB_PER_BUFFER": MEGABYTES}


def enlarge_command_buffers() -> None:
    """Set both limits where this computes on an Apple GPU and the user has not set them.

    MLX reads them once, when it starts the GPU: for the first array, operation or stream, or to say
    what device it is. Later this does nothing; neither question here starts it.
    """
    if mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu):
        for name, value in _VARIABLES.items():
            os.environ.setdefault(name, str(value))
