"""Which kernels run on the GPU at hand, and how they divide their work: what changes their speed.

The defaults on NVIDIA GPUs are the fastest of those tried on an H200. On Apple GPUs nothing is
measured yet: they follow from counts of work and of registers (`python -m benchmarks.apple_gpu`).
`mlx_kimi tune` measures on the user's own GPU, and makes other `Choices` for a model.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Literal, NamedTuple

import mlx.core as mx

from mlx_kimi.metal_kernels.kernel import backend, refused_kernels, without


class AttendShape(NamedTuple):
    """Of mla_attend: one token's attention to one split."""

    heads: int  # of a threadgroup: each latent is read once for so many
    channels: int  # of a simdgroup, 32 or 64: with 512 latent channels, 512 or 256 threads
    positions: int  # of a block, a multiple of 8: after each, all simdgroups wait for one another


class PrefillShape(NamedTuple):
    """Of mla_prefill."""

    queries: int  # of a simdgroup
    positions: int  # that it takes at a time


class ExpertForm(NamedTuple):
    """Of the experts of many tokens: which kernels multiply them."""

    pairs_from: float  # pairs (token, expert) of an average expert: of the 48B T / 32
    kernels: Literal["vectors", "tiles", "MLX"]
    tiles: int = 0  # of 8 tokens, that are multiplied at a time: 1, 2, 4
    shared: bool = True  # the shared expert in the same launches, where it is stored alike


class Tuning(NamedTuple):
    """What one GPU is given."""

    attend: AttendShape
    attend_packed: AttendShape  # where latents are packed, which takes more registers
    prefill: PrefillShape
    splits: int  # into which one token's attention to a long text is cut
    experts: tuple[ExpertForm, ...]  # by `pairs_from`; the first is from 0 on
    skip_tiles: bool  # where no token is: a branch in the innermost loop, which costs, too
    columns: int = 8  # of a KDA state, of a simdgroup of kda_chunk_scan; 16 may lack registers
    chunked_from: int = 32  # tokens that KDA takes in chunks: two of them
    largest_batch: int = 8  # tokens, each with experts of its own; beyond, sorting reads less
    # Queries of MLA that attend to expanded keys and values, after however long a text. Expanding a
    # latent costs lora * (nope + v) products a head, as much as taking a query into latent space
    # and its result out of it. It saves 2 * lora - nope - v for every query: at the published sizes
    # a 171st. Where positions are few, fewer queries expand.
    expand_from: int = 171
    # Pairs (token, expert) from which MLX's operations sort them by expert: each expert's matrix is
    # then read once and multiplies all of its tokens.
    sort_from: int = 64


# Of the experts, measured on an H200: up to 192 tokens one tile is up to 1.2 times as fast as two;
# from 256 tokens on two are faster, from 512 on four, at 1,024 by 1.16. Without branches all are
# 1.2 to 1.3 times as fast. By 23 runs of the probe, halves of layers are 1.04 to 1.14 times as fast
# with 24 splits as with 160, 1.12 with chunks from 64 tokens, 1.5 with expanding from 512.
NVIDIA = Tuning(
    AttendShape(16, 64, 16),
    AttendShape(16, 64, 16),
    PrefillShape(16, 32),
    splits=24,
    chunked_from=64,
    expand_from=512,
    experts=(
        ExpertForm(0, "tiles", 1),
        ExpertForm(7, "tiles", 2),
        ExpertForm(16, "tiles", 4, shared=False),
    ),
    skip_tiles=False,
)

# A thread of an Apple GPU has up to 128 registers, as far as is known. Each of 512, which could
# read a latent once for all heads, has 104 before M3, and MLX refuses a launch that needs more. By
# the estimate of tools/metal_emulator these shapes need 127, 113 and 116. A split of the 48B is two
# threadgroups (four of packed latents), and the splits are 2 to 5 threadgroups a core.
BASE = Tuning(
    AttendShape(16, 64, 8),
    AttendShape(8, 64, 8),
    PrefillShape(8, 16),
    splits=24,
    experts=(ExpertForm(0, "vectors"), ExpertForm(3.3, "tiles", 4)),
    skip_tiles=True,
)
MAX, ULTRA = BASE._replace(splits=60), BASE._replace(splits=120)  # of 24 to 40, and 48 to 80 cores


# Experts on later GPUs than the M1's and M2's, as `python -m benchmarks.apple_experts` has it.
FROM_M3 = (ExpertForm(0, "vectors"), ExpertForm(4.3, "tiles", 4))
# An M5's matrix units are open to MLX alone, from macOS 26.2 on, in its product of sorted rows.
FROM_M5 = (ExpertForm(0, "vectors"), ExpertForm(4, "MLX"))
M3, M5 = 15, 17  # generations of GPUs, as their names count them
MACOS_26_2 = (25, 2)  # as its kernel counts versions, which is told to every Python alike


@dataclass(frozen=True)
class Choices:
    """What runs on one GPU for one model. They change roundings, never meaning."""

    tuning: Tuning
    off: Mapping[str, str] = field(default_factory=dict)  # kernels that do not run, and why

    @property
    def digest(self) -> str:
        """The same for two that compute the same bits: without kernels, all of them."""
        off = tuple(sorted({*self.off, *refused_kernels()}))
        return _digest(self.tuning, off) if backend() else NO_KERNELS

    @contextmanager
    def use(self) -> Iterator[None]:
        """Within, operators run by these."""
        token = _CHOSEN.set(self.tuning)
        try:
            with without(self.off):
                yield
        finally:
            _CHOSEN.reset(token)

    @staticmethod
    def default() -> Choices:
        """Those of a GPU on which nothing has been measured."""
        return Choices(default_tuning())


NO_KERNELS = "none"  # the digest where no kernels run


@lru_cache
def _digest(tuning: Tuning, off: tuple[str, ...]) -> str:
    forms = tuple(form._replace(pairs_from=float(form[0])) for form in tuning.experts)
    chosen = repr((tuning._replace(experts=forms), off))
    return hashlib.sha256(chosen.encode()).hexdigest()[:8]


_CHOSEN: ContextVar[Tuning | None] = ContextVar("tuning", default=None)


def tuning() -> Tuning:
    """What is chosen at this moment."""
    return _CHOSEN.get() or default_tuning()


@contextmanager
def use_tuning(chosen: Tuning) -> Iterator[None]:
    """Within, operators divide their work by `chosen`."""
    with Choices(chosen).use():
        yield


@cache
def default_tuning() -> Tuning:
    """That of the GPU at hand; without one, and on one whose name is new, BASE."""
    if mx.cuda.is_available():
        return NVIDIA
    if not mx.metal.is_available():
        return BASE
    return apple_tuning(str(mx.device_info()["architecture"]), platform.release())


def apple_tuning(architecture: str, release: str) -> Tuning:
    """Of an Apple GPU such as applegpu_g13s, the M1 Max, under a kernel of macOS such as 25.2.0."""
    found = re.fullmatch(r"applegpu_g(\d+)(\w)", architecture)
    if found is None:
        return BASE
    generation, size = int(found[1]), {"s": MAX, "d": ULTRA}.get(found[2], BASE)
    version = tuple(int(number) for number in release.split(".") if number.isdigit())
    has_matrix_units = generation >= (M5 + 1 if found[2] == "p" else M5)  # (p: a phone's)
    if has_matrix_units and version >= MACOS_26_2:
        return size._replace(experts=FROM_M5)
    return size._replace(experts=FROM_M3) if generation >= M3 else size
