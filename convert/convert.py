"""A checkpoint -> a folder in the MLX layout, block by block, complete or not there at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from mlx_kimi.checkpoint.files import INDEX
from mlx_kimi.checkpoint.tensors import Tensor
from mlx_kimi.checkpoint.weight_source import WeightSource
from mlx_kimi.convert.folder import copied_files, refuse_changed, result_config, small_files
from mlx_kimi.convert.partial import check_out, open_partial
from mlx_kimi.convert.plan import ConversionPlan, plan_conversion
from mlx_kimi.convert.preview import Preview, preview_of
from mlx_kimi.convert.quantize import DTYPES, Scheme
from mlx_kimi.convert.recorded import recorded_blocks
from mlx_kimi.convert.request import request
from mlx_kimi.convert.shards import MAX_SHARD, write_index
from mlx_kimi.convert.source import Around, open_reader, open_source
from mlx_kimi.convert.write import Progress, write_weights


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    out: Path
    source_bytes: int  # of the weights
    out_bytes: int
    parameters: int
    shards: int
    kept_unquantized: tuple[Tensor, ...]  # since the group does not divide their last axis
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
    preview: Callable[[Preview], None] = lambda preview: None,
    max_shard: int = MAX_SHARD,
    delete_source_shards: bool = False,
    around_downloads: Around = nullcontext,
    say: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Write `source` to the new folder `out` in the MLX layout, for mlx_kimi and mlx-lm.

    Two runs give the same bytes, and so does one that was interrupted, however often, and called
    again: until everything is written the result lies in `<out>.partial`, which the next call
    with the same arguments goes on with.

    Args:
        source: an unquantized folder, published, written by transformers 5 or in the MLX layout,
            or a name on the hub.
        out: must not exist.
        scheme: what is quantized and how (`quantize.scheme`); None leaves all as it is.
        dtype: "bfloat16", "float16" or "float32" for scales and what is not quantized; None keeps
            each tensor's own.
        progress: called after every block.
        preview: called once, before the first block.
        max_shard: bytes of data in one file.
        delete_source_shards: of a name on the hub: download one file of weights at a time, into
            `<out>.partial`, and delete it when all that was made of it is on the disk and recorded.
        around_downloads: entered for each download, which shows its progress on stderr.
        say: is told what the download of a whole source takes.

    Raises:
        KimiError: the source is not a whole unquantized model, changes meanwhile, or holds NaN or
            infinity; the result cannot be written or its disk is too small; `<out>.partial` is of
            another source, other arguments or another version, or in use; a folder's shards should
            be deleted.
        ValueError: an unknown dtype.
    """
    out = Path(out)
    _check_arguments(out, dtype)
    weights = open_source(source, out, delete_source_shards, around_downloads, say)
    small = small_files(weights.folder)
    reader = open_reader(weights)
    began = time.monotonic()
    plan = plan_conversion(reader, scheme, dtype, max_shard)
    config = result_config(weights.folder, reader.config, scheme, dtype, plan.quantizations)
    refuse_changed(weights.folder, small)
    asked, copied = request(weights, small, scheme, dtype, max_shard), copied_files(small)
    files = (*(shard.file for shard in plan.shards), INDEX, *copied, "config.json")
    with open_partial(out, asked, files) as partial:
        recorded = recorded_blocks(partial, plan, reader)
        preview(preview_of(partial, plan, weights, reader, copied))
        write_weights(partial, plan, weights, reader, recorded, progress)
        write_index(partial.folder, plan.shards, plan.parameters)
        # config.json last: without it nothing takes the folder for a model.
        for name, data in (*copied.items(), ("config.json", config)):
            (partial.folder / name).write_bytes(data)
    return _summary(out, weights, plan, time.monotonic() - began)


def _check_arguments(out: Path, dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"[convert] dtype must be one of {', '.join(DTYPES)} but is {dtype}.")
    check_out(out)


def _summary(out: Path, source: WeightSource, plan: ConversionPlan, seconds: float) -> Summary:
    return Summary(
        out=out,
        source_bytes=sum(map(source.size, source.checkpoint.files)),
        out_bytes=plan.out_bytes,
        parameters=plan.parameters,
        shards=len(plan.shards),
        kept_unquantized=plan.kept_unquantized,
        seconds=seconds,
    )
