"""`mlx_kimi convert`: a checkpoint -> a folder of a quarter of its size."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mlx_kimi.checkpoint.config import QUANTIZATION_MODES
from mlx_kimi.checkpoint.hub import local_folder
from mlx_kimi.checkpoint.tensors import Tensor
from mlx_kimi.cli import convert_report
from mlx_kimi.convert.convert import Summary, convert
from mlx_kimi.convert.partial import partial_of
from mlx_kimi.convert.plan import DTYPES
from mlx_kimi.convert.preview import Preview
from mlx_kimi.convert.quantize import RECIPES, Scheme, scheme
from mlx_kimi.convert.report.quality import TOKENS
from mlx_kimi.convert.write import Progress as OnProgress
from mlx_kimi.units import human_size

Hidden = Callable[[], AbstractContextManager[object]]

_AFFINE_GROUPS, _AFFINE_BITS = QUANTIZATION_MODES["affine"]
_RECIPES = "\n\n".join(f"  {name}: {recipe.reason}." for name, recipe in RECIPES.items())


def _choices(values: tuple[int, ...]) -> str:
    return "[" + "|".join(map(str, values)) + "]"


@click.command("convert", epilog=f"Recipes, with the size of the 48B:\n\n{_RECIPES}")
@click.argument("source", metavar="SRC")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--bits",
    type=int,
    metavar=_choices(_AFFINE_BITS),
    show_default="4; 6 with a recipe for experts",
    help="Bits of a weight.",
)
@click.option(
    "--group-size",
    type=int,
    metavar=_choices(_AFFINE_GROUPS),
    show_default="64",
    help="Weights that share a scale.",
)
@click.option(
    "--mode",
    type=click.Choice(list(QUANTIZATION_MODES)),
    show_default="affine",
    help="Form of the numbers; all but affine fix bits and group size.",
)
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    show_default="default",
    help="Other bits for some tensors, see below.",
)
@click.option("--no-quantize", is_flag=True, help="Change the layout only.")
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    show_default="as in SRC",
    help="Of scales and of what is not quantized.",
)
@click.option(
    "--delete-source-shards",
    is_flag=True,
    help="Of a name on the hub, download one shard at a time and delete it when it is converted.",
)
@click.option(
    "--report",
    is_flag=True,
    help="Then compare OUT with SRC, layer by layer: a table, and OUT/quality.json.",
)
@click.option(
    "--report-text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    show_default="a sample",
    help=f"The text that --report lets both predict; its first {TOKENS} tokens.",
)
def command(
    source: str,
    out: Path,
    bits: int | None,
    group_size: int | None,
    mode: str | None,
    recipe: str | None,
    no_quantize: bool,
    dtype: str | None,
    delete_source_shards: bool,
    report: bool,
    report_text: Path | None,
) -> None:
    """Convert SRC, a folder or a name on the hub, to the new folder OUT.

    OUT is in the MLX layout, which mlx-lm reads too. SRC must not be quantized. What is
    interrupted is kept in OUT.partial, and the same command goes on from there.
    """
    given = {"bits": bits, "group_size": group_size, "mode": mode, "recipe": recipe}
    chosen = _scheme(
        {name: value for name, value in given.items() if value is not None}, no_quantize
    )
    if report and delete_source_shards:
        raise click.UsageError("--report reads SRC again and --delete-source-shards deletes it.")
    ids = convert_report.sample(source, report, report_text)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        with _bar(Console(stderr=True)) as (progress, hidden):

            def show_preview(preview: Preview) -> None:
                with hidden():
                    _print_preview(preview)

            done = convert(
                source,
                out,
                chosen,
                dtype,
                progress,
                show_preview,
                delete_source_shards=delete_source_shards,
                around_downloads=hidden,
            )
    except (KeyboardInterrupt, SystemExit):
        if partial_of(out).exists():
            kept = f"{partial_of(out)} keeps what is done; the same command goes on from there"
            click.echo(f"\n{kept}", err=True)
        raise
    _print_summary(done)
    if ids is not None:
        convert_report.compare(local_folder(source), out, ids)


def _terminated(number: int, _: object) -> None:
    sys.exit(128 + number)


def _scheme(given: dict[str, object], no_quantize: bool) -> Scheme | None:
    if no_quantize and given:
        option = "--" + next(iter(given)).replace("_", "-")
        raise click.UsageError(f"--no-quantize and {option} exclude each other.")
    if no_quantize:
        return None
    try:
        return scheme(**given)  # type: ignore[arg-type]
    except ValueError as error:
        raise click.UsageError(f"--{error}.") from None


@contextmanager
def _bar(console: Console) -> Iterator[tuple[OnProgress, Hidden]]:
    """A progress bar with the time that is left, on a terminal; and how to hide it for a while."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    piped = not sys.stderr.isatty()
    with Progress(*columns, console=console, disable=piped, transient=True) as bar:
        task = bar.add_task("converting", total=None)

        @contextmanager
        def hidden() -> Iterator[None]:
            bar.stop()
            yield
            bar.start()

        yield lambda done, total: bar.update(task, completed=done, total=total), hidden


def _print_preview(preview: Preview) -> None:
    size = human_size(preview.out_bytes)
    if preview.left_bytes < preview.out_bytes:
        size = f"going on: {human_size(preview.left_bytes)} of {size}"
    if preview.source_at_once:
        at_once = human_size(preview.source_at_once)
        size += f" to write, and at most {at_once} of the source at a time"
    else:
        size += " to write"
    click.echo(
        f"{size}, {human_size(preview.free)} free on that disk; "
        f"at most {human_size(preview.memory)} of memory",
        err=True,
    )


def _print_summary(summary: Summary) -> None:
    files = "1 file" if summary.shards == 1 else f"{summary.shards} files"
    click.echo(
        f"{summary.out}: {human_size(summary.out_bytes)} in {files}, made from "
        f"{human_size(summary.source_bytes)}; {summary.bits_per_weight:.3f} bits per weight, "
        f"{summary.seconds:.1f} s",
        err=True,
    )
    if summary.kept_unquantized:
        kept = _widths(summary.kept_unquantized)
        click.echo(f"Not quantized, as the group does not divide the width: {kept}", err=True)


def _widths(tensors: Sequence[Tensor]) -> str:
    """`3 x self_attn.f_b_proj (width 48), ...`: one entry for the same module of all layers."""
    families: Counter[tuple[str, int]] = Counter()
    for tensor in tensors:
        name = tensor.module
        if name.startswith("model.layers."):
            name = name.split(".", 3)[3]
        families[name, tensor.shape[-1]] += 1
    return ", ".join(f"{n} x {name} (width {width})" for (name, width), n in families.items())
