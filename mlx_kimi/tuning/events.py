"""What a probe tells while it works: one of these at a time, from the child to its parent."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_kimi.metal_kernels.tuning import Tuning


@dataclass(frozen=True)
class Trying:
    """A kernel is about to run for the first time in some form; None: what was tried has run."""

    kernel: str | None


@dataclass(frozen=True)
class Off:
    """A kernel is not to run."""

    kernel: str
    why: str


@dataclass(frozen=True)
class Note:
    """What was measured, in a line."""

    text: str


@dataclass(frozen=True)
class Chosen:
    """All that runs is right; how it divides its work, as far as measured."""

    tuning: Tuning


@dataclass(frozen=True)
class Done:
    """All has been measured."""


@dataclass(frozen=True)
class Failed:
    """The end, for a reason that is no kernel's: no memory, or a model that MLX does not run."""

    text: str


Event = Trying | Off | Note | Chosen | Done | Failed
