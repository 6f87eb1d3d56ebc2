"""`mlx_kimi convert`: a checkpoint -> a folder of a quarter of its size."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import click

from mlx_kimi.checkpoint.hub import local_folder
from mlx_kimi.checkpoint.tensors import Tensor
from mlx_kimi.cli import convert_report
from mlx_kimi.cli.progress import BYTES, work
from mlx_kimi.convert.convert import Summary, convert
from mlx_kimi.convert.partial import partial_of
from mlx_kimi.convert.preview import Preview
from mlx_kimi.convert.quantize import Scheme, scheme
from mlx_kimi.loading.kept_models import remember_converted
from mlx_kimi.units import counted, human_size

Hidden = Callable[[], AbstractContextManager[object]]


def run(
    out: Path,
    source: str,
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
    given = {"bits": bits, "group_size": group_size, "mode": mode, "recipe": recipe}
    chosen = _scheme(
        {name: value for name, value in given.items() if value is not None}, no_quantize
    )
    if report and delete_source_shards:
        raise click.UsageError(
            "--report reads the model again, which --delete-source-shards deletes."
        )
    ids = convert_report.sample(source, report, report_text)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        with work(unit=BYTES) as progress:
            progress.at("converting")

            def say(line: str) -> None:
                with progress.hidden():
                    click.echo(line, err=True)

            def show_preview(preview: Preview) -> None:
                with progress.hidden():
                    _print_preview(preview)

            done = convert(
                source,
                out,
                chosen,
                dtype,
                progress,
                show_preview,
                delete_source_shards=delete_source_shards,
                around_downloads=progress.hidden,
                say=say,
            )
    except (KeyboardInterrupt, SystemExit):
        if partial_of(out).exists():
            kept = f"{partial_of(out)} keeps what is done; the same command goes on from there"
            click.echo(f"\n{kept}", err=True)
        raise
    _print_summary(done)
    if ids is not None:
        convert_report.compare(local_folder(source), out, ids)
    try:
        remember_converted(out)  # with its report
    except OSError as error:
        why = f"{error.filename}: {error.strerror}"
        click.echo(f"`mlx_kimi list` and `rm` will not know {out}: {why}", err=True)


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
    files = counted(summary.shards, "file")
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
