"""How kernels divide their work on the GPU at hand: sizes that change how fast they are.

On NVIDIA GPUs they are the fastest of those tried on an H200. On Apple GPUs nothing is measured
yet: they follow from counts of work and of registers (`python -m benchmarks.apple_gpu`).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import mlx.core as mx


class AttendShape(NamedTuple):
    """Of mla_attend: one token's attention to one split."""

    heads: int  # of a threadgroup: each latent is read once for so many
    channels: int  # of a simdgroup, 32 or 64: with 512 latent channels, 512 or 256 threads
    positions: int  # of a block, a multiple of 8: after each, all simdgroups wait for one another


class PrefillShape(NamedTuple):
    """Of mla_prefill."""

    queries: int  # of a simdgroup
    positions: int  # that it takes at a time


class Tuning(NamedTuple):
    """What one GPU is given."""

    attend: AttendShape
    attend_packed: AttendShape  # where latents are packed, which takes more registers
    prefill: PrefillShape
    splits: int  # into which one token's attention to a long text is cut


NVIDIA = Tuning(AttendShape(16, 64, 16), AttendShape(16, 64, 16), PrefillShape(16, 32), splits=160)

# A thread of an Apple GPU has up to 128 registers, as far as is known. Each of 512, which could
# read a latent once for all heads, has 104 before M3, and MLX refuses a launch that needs more. By
# the estimate of tools/metal_emulator these shapes need 127, 113 and 116. A split of the 48B is two
# threadgroups (four of packed latents), and the splits are 2 to 5 threadgroups a core.
BASE = Tuning(AttendShape(16, 64, 8), AttendShape(8, 64, 8), PrefillShape(8, 16), splits=24)
MAX, ULTRA = BASE._replace(splits=60), BASE._replace(splits=120)  # of 24 to 40, and 48 to 80 cores


@cache
def tuning() -> Tuning:
    """That of the GPU at hand; without one, and on one whose name is new, BASE."""
    if mx.cuda.is_available():
        return NVIDIA
    if not mx.metal.is_available():
        return BASE
    architecture = str(mx.device_info()["architecture"])  # applegpu_g13s: the M1 Max
    return {"s": MAX, "d": ULTRA}.get(architecture[-1], BASE)
