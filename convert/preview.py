"""What a conversion is about to take, and whether the disk has it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from mlx_kimi.checkpoint.weight_source import WeightSource
from mlx_kimi.convert.blocks import TensorReader
from mlx_kimi.convert.partial import Partial
from mlx_kimi.convert.plan import ConversionPlan, peak_memory
from mlx_kimi.errors import KimiError
from mlx_kimi.units import human_size


@dataclass(frozen=True)
class Preview:
    """What a conversion is about to do, in bytes."""

    out_bytes: int  # of the result
    left_bytes: int  # still to be written; less than all where an earlier run was interrupted
    memory: int  # that the process takes at most
    free: int  # on the disk of the result
    source_at_once: int  # of the source on that disk at a time, if it is deleted as it is used


def preview_of(
    partial: Partial,
    plan: ConversionPlan,
    source: WeightSource,
    reader: TensorReader,
    copied: Mapping[str, bytes],
) -> Preview:
    """What is left to do for the result of `plan` and the files that are `copied` beside it.

    Raises:
        KimiError: the disk is too small.
    """
    position = partial.position
    whole, written = plan.out_bytes + sum(map(len, copied.values())), plan.written_bytes(position)
    left, free = whole - written, shutil.disk_usage(partial.out.parent).free
    at_once = source.disk_at_once({step.file for step in plan.steps[position.step :]})
    to_download = max(at_once - partial.downloaded_bytes, 0)
    if left + to_download > free:
        rest = f"{human_size(left)} of {human_size(whole)}" if written else human_size(left)
        if to_download:
            rest += f", and {human_size(to_download)} for a shard of the source at a time,"
        raise KimiError(f"{partial.out}: needs {rest} but its disk has {human_size(free)} free")
    return Preview(whole, left, peak_memory(plan, reader), free, at_once)
