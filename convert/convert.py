"""A checkpoint -> a folder in the MLX layout, block by block, complete or not there at all."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.fields import read_json
from mlx_kimi.checkpoint.files import Checkpoint
from mlx_kimi.checkpoint.hub import is_folder, local_folder
from mlx_kimi.checkpoint.hub_weights import HubWeights
from mlx_kimi.checkpoint.tensors import Tensor, tensors
from mlx_kimi.convert.blocks import Source
from mlx_kimi.convert.folder import converted_config, copied_files, small_files
from mlx_kimi.convert.partial import (
    SOURCE,
    begun_otherwise,
    check_out,
    interrupted_request,
    opened,
    partial_of,
)
from mlx_kimi.convert.plan import DTYPES, Plan, peak_memory, plan_of
from mlx_kimi.convert.quantize import Scheme
from mlx_kimi.convert.request import Request, begun_revision, other_deleting, request
from mlx_kimi.convert.shards import MAX_SHARD, lay_out, write_index
from mlx_kimi.convert.steps import steps_of, written_bytes
from mlx_kimi.convert.write import Progress, write_weights
from mlx_kimi.errors import KimiError
from mlx_kimi.loading.match import check
from mlx_kimi.units import human_size


@dataclass(frozen=True)
class Preview:
    """What a conversion is about to do, in bytes."""

    out_bytes: int  # of the result
    left_bytes: int  # still to be written; less than all where an earlier run was interrupted
    memory: int  # that the process takes at most
    free: int  # on the disk of the result
    source_at_once: int  # of the source on that disk at a time, if it is deleted as it is used


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    out: Path
    source_bytes: int  # of the weights
    out_bytes: int
    parameters: int
    shards: int
    refused: tuple[Tensor, ...]  # not quantized, since the group does not divide their last axis
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        return self.out_bytes * 8 / self.parameters


def convert(
    source: str | Path,
    out: str | Path,
    scheme: Scheme | None,
    dtype: str | None = None,
    progress: Progress = lambda done, total: None,
    outlook: Callable[[Preview], None] = lambda outlook: None,
    max_shard: int = MAX_SHARD,
    delete_source_shards: bool = False,
    around_downloads: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Report:
    """Write `source` to the new folder `out` in the MLX layout, for mlx_kimi and mlx-lm.

    Two runs give the same bytes, and so does one that was interrupted, however often, and called
    again: until everything is written the result lies in `<out>.partial`, which the next call
    with the same arguments takes up.

    Args:
        source: an unquantized folder, published, written by transformers 5 or in the MLX layout,
            or a name on the hub.
        out: must not exist.
        scheme: what is quantized and how (`quantize.scheme`); None leaves all as it is.
        dtype: "bfloat16", "float16" or "float32" for scales and what is not quantized; None keeps
            each tensor's own.
        progress: called after every block.
        outlook: called once, before the first block.
        max_shard: bytes of data in one file.
        delete_source_shards: of a name on the hub: download one file of weights at a time, into
            `<out>.partial`, and delete it when all that was made of it is on the disk and recorded.
        around_downloads: entered for each download, which shows its progress on stderr.

    Raises:
        KimiError: the source is not a whole unquantized model, changes meanwhile, or holds NaN or
            infinity; the result cannot be written or its disk is too small; `<out>.partial` is of
            another source, other arguments or another version, or in use; a folder's shards should
            be deleted.
        ValueError: an unknown dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"[convert] dtype must be one of {', '.join(DTYPES)} but is {dtype}.")
    out = Path(out)
    check_out(out)
    begun = interrupted_request(out)
    if begun and (changed := other_deleting(begun, delete_source_shards)):
        raise KimiError(begun_otherwise(out, changed))  # before the whole source is downloaded
    hub = _hub_weights(source, out, begun, around_downloads) if delete_source_shards else None
    with around_downloads():
        folder = hub.described if hub else local_folder(source)
    if out.resolve().is_relative_to(folder.resolve()):
        raise KimiError(f"{out}: the result cannot lie inside its source {folder}")
    small = small_files(folder)
    config = ModelConfig.read(folder)
    _check_unquantized(folder, config)
    checkpoint = hub.checkpoint if hub else Checkpoint(folder)
    check(config, checkpoint)

    began = time.monotonic()
    reader = Source(checkpoint, config, hub.folder if hub else folder)
    plans = [plan_of(tensor, reader, config, scheme, dtype) for tensor in tensors(config)]
    shards = lay_out([plan.parts for plan in plans], max_shard)
    settings = _config(folder, config, scheme, dtype, plans)
    parameters = sum(math.prod(plan.tensor.shape) for plan in plans)
    if small_files(folder) != small:
        raise KimiError(f"{folder}: its config.json or tokenizer was changed while it was opened")
    beside = copied_files(small)
    steps = steps_of(plans, reader)
    whole = sum(shard.nbytes for shard in shards) + sum(map(len, beside.values()))
    with opened(out, request(checkpoint, small, scheme, dtype, max_shard, hub)) as partial:
        if hub:
            hub.delete_cut_downloads()
        written = written_bytes(steps, partial.position.step, partial.position.rows)
        left = {step.file for step in steps[partial.position.step :]}
        a_shard, there = (hub.largest(left), hub.kept_bytes()) if hub else (0, 0)
        outlook(_outlook(out, whole, written, peak_memory(plans, reader), a_shard, there))
        write_weights(partial, shards, steps, reader, progress, hub)
        write_index(partial.folder, shards, parameters)
        for name, data in beside.items():
            (partial.folder / name).write_bytes(data)
        # Last: without it nothing takes the folder for a model.
        text = json.dumps(settings, indent=4) + "\n"
        (partial.folder / "config.json").write_text(text, encoding="utf-8")
    return Report(
        out=out,
        source_bytes=sum(
            hub.files[file] if hub else checkpoint.headers[file].version.size
            for file in checkpoint.files
        ),
        out_bytes=sum(shard.nbytes for shard in shards),
        parameters=parameters,
        shards=len(shards),
        refused=tuple(plan.tensor for plan in plans if plan.refused),
        seconds=time.monotonic() - began,
    )


def _check_unquantized(folder: Path, config: ModelConfig) -> None:
    found = config.quantization
    if found is not None:
        raise KimiError(
            f"{folder}: is quantized already ({found.mode}, {found.bits} bits, group "
            f"{found.group_size}); convert the checkpoint that it was made from"
        )


def _hub_weights(
    source: str | Path,
    out: Path,
    begun: Request | None,
    around: Callable[[], AbstractContextManager[object]],
) -> HubWeights:
    if is_folder(source):
        raise KimiError(
            f"{source}: --delete-source-shards is for a name on the hub, whose shards can be "
            "downloaded again; nothing in a folder is ever deleted"
        )
    revision = begun_revision(begun, str(source)) if begun else None
    return HubWeights(str(source), partial_of(out) / SOURCE, revision, around)


def _outlook(out: Path, whole: int, written: int, memory: int, a_shard: int, there: int) -> Preview:
    """Sizes, and a refusal where the disk is too small.

    `a_shard` is the largest of the source that is still to be downloaded, `there` what is already.
    """
    left, to_download = whole - written, max(a_shard - there, 0)
    free = shutil.disk_usage(out.parent).free
    if left + to_download > free:
        rest = f"{human_size(left)} of {human_size(whole)}" if written else human_size(left)
        if to_download:
            rest += f", and {human_size(to_download)} for a shard of the source at a time,"
        raise KimiError(f"{out}: needs {rest} but its disk has {human_size(free)} free")
    return Preview(whole, left, memory, free, a_shard)


def _config(
    folder: Path,
    config: ModelConfig,
    scheme: Scheme | None,
    dtype: str | None,
    plans: list[Plan],
) -> dict[str, Any]:
    default = None if scheme is None else scheme.default
    overrides = {
        plan.tensor.module: plan.quantization
        for plan in plans
        if plan.quantization is not None and plan.quantization != default
    }
    written = read_json(folder / "config.json")
    return converted_config(written, config, dtype, default, overrides)
