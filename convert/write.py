"""Weights: read, converted and written at the same time, a few blocks of each in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_kimi.checkpoint.config import Quantization
from mlx_kimi.checkpoint.files import DTYPES
from mlx_kimi.checkpoint.weight_source import WeightSource
from mlx_kimi.convert.blocks import RowBlock, TensorReader
from mlx_kimi.convert.output import Converted, Output
from mlx_kimi.convert.partial import Partial
from mlx_kimi.convert.pipeline import ahead
from mlx_kimi.convert.plan import AHEAD, BEHIND, CACHE, ConversionPlan
from mlx_kimi.convert.recorded import Recorded, check_written
from mlx_kimi.errors import KimiError

Progress = Callable[[int, int], None]  # (bytes read, bytes to read)


def write_weights(
    partial: Partial,
    plan: ConversionPlan,
    source: WeightSource,
    reader: TensorReader,
    recorded: Sequence[Recorded],
    progress: Progress,
) -> None:
    """Write what `partial` does not have yet, once it has what is `recorded`.

    A file of the source is fetched when its turn comes, and released when it is converted. A
    record follows the sync of what it stands for.
    """
    begin, done = partial.position, 0
    total = sum(block.nbytes for block in plan.blocks(reader))

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    check_written(partial, plan, recorded, advance)
    cache_limit = mx.set_cache_limit(CACHE)
    try:
        with Output(partial, plan.shards) as output:
            for file, numbers in plan.by_file():
                if numbers.stop > begin.step:
                    source.fetch(file)
                blocks = list(plan.blocks(reader, begin, numbers))
                _convert_blocks(plan, blocks, reader, output, advance)
                reader.close(file)
                source.release(file, output.record)
            output.record()
    finally:
        mx.set_cache_limit(cache_limit)


def _convert_blocks(
    plan: ConversionPlan,
    blocks: Sequence[RowBlock],
    reader: TensorReader,
    output: Output,
    advance: Callable[[int], None],
) -> None:
    """Convert blocks of one file of the source; `advance` hears of each once it is written.

    One thread reads, this one converts, and one writes, each a bounded number of blocks apart.
    """

    def converted(block: RowBlock, values: np.ndarray) -> Converted:
        return _converted(plan, block, values, reader)

    with (
        ahead(reader.read, blocks, AHEAD) as read,
        ahead(output.write, map(converted, blocks, read), BEHIND) as written,
    ):
        for nbytes in written:
            advance(nbytes)


def _converted(
    plan: ConversionPlan, block: RowBlock, values: np.ndarray, reader: TensorReader
) -> Converted:
    """Convert a block from the values that were read."""
    tensor_plan = plan.of(block.source)
    stored = reader.rows(block, values)
    rows = stored.astype(DTYPES[tensor_plan.dtype])
    _check_finite(block, stored, rows)
    arrays = [mx.contiguous(array) for array in _quantized(rows, tensor_plan.quantization)]
    mx.eval(arrays)
    names = [output.name for output in tensor_plan.outputs]
    return block, dict(zip(names, map(memoryview, arrays), strict=True))  # type: ignore[arg-type]


def _quantized(rows: mx.array, quantization: Quantization | None) -> Sequence[mx.array]:
    """[rows, in] -> packed weights, scales and (in affine mode) biases; or itself.

    A group lies within a row, so that a matrix quantized in blocks of rows is the same.
    """
    if quantization is None:
        return [rows]
    return mx.quantize(
        rows,
        group_size=quantization.group_size,
        bits=quantization.bits,
        mode=quantization.mode,
    )


def _check_finite(block: RowBlock, stored: mx.array, rows: mx.array) -> None:
    # The sum is five times as fast, and finite unless an element is not or very many are huge.
    if mx.isfinite(mx.sum(rows)).item() or mx.all(mx.isfinite(rows)).item():
        return
    source = block.source
    if mx.all(mx.isfinite(stored)).item():
        dtype = str(rows.dtype).removeprefix("mlx.core.")
        raise KimiError(
            f"{source.file}: {source.name} has values beyond {dtype}; choose another dtype"
        )
    raise KimiError(f"{source.file}: {source.name} holds NaN or infinity")
