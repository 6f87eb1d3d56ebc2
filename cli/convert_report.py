"""`--report` of `convert`: what the conversion cost, as a table in per cent and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.cli import show
from mlx_kimi.cli.given import read_text
from mlx_kimi.cli.progress import work
from mlx_kimi.convert.report.quality import (
    LayerQuality,
    Quality,
    measure,
    peak_memory,
    sample_ids,
    sample_text,
    write,
)
from mlx_kimi.loading.fetch import headers_of
from mlx_kimi.units import human_size

COLUMNS = (  # two lines of title, family of weights
    ("q, k,", "v", "q, k, v"),
    ("", "gates", "gates"),
    ("", "latents", "latents"),
    ("", "o", "o"),
    ("", "router", "router"),
    ("experts", "gate", "experts gate"),
    ("", "up", "experts up"),
    ("", "down", "experts down"),
    ("dense,", "shared", "dense or shared"),
    ("", "rest", "rest"),
)
NAME, WIDTH = 16, 9
LEGEND = """\
relative errors ||q - w|| / ||w|| in %, layers counted from 0
alone     of the layer's output, with what the unquantized layers before give as its input
together  of the layer's output, with this layer and all before it as they were written"""


def sample(source: str, report: bool, file: Path | None) -> list[int] | None:
    """The tokens to predict, None without --report; read first, since it fails in milliseconds."""
    if not report:
        if file is not None:
            raise click.UsageError("--report-text needs --report.")
        return None
    text = sample_text() if file is None else read_text(file)
    return sample_ids(headers_of(source)[0], text)


def compare(source: Path, out: Path, ids: list[int]) -> None:
    """Measure what the conversion of `source` to `out` cost, print it and write it into `out`."""
    limit = peak_memory(ModelConfig.read(out))
    click.echo(f"comparing with the source: at most {human_size(limit)} of memory", err=True)
    try:
        with work("comparing", "layers") as progress:
            quality = measure(source, out, ids, progress)
    except (KeyboardInterrupt, SystemExit):
        click.echo(f"\n{out} is whole; the report was not finished", err=True)
        raise
    path = write(quality, out)
    for line in lines(quality):
        click.echo(line)
    click.echo(f"{path} holds this and more", err=True)


def lines(quality: Quality) -> Iterator[str]:
    """What stdout gets."""
    yield LEGEND
    outputs = (("output", "alone"), ("", "together"))
    titles = [title[:2] for title in COLUMNS] + list(outputs)
    for line in (0, 1):
        yield _aligned("layer" if line else "", [title[line] for title in titles])
    for layer in quality.layers:
        yield _layer(layer)
    for name, error in quality.outside.items():
        yield _aligned(name if name != "rest" else "last norm", [_percent(error)])
    yield from _predictions(quality)


def _layer(layer: LayerQuality) -> str:
    cells = [
        _percent(layer.weights[family]) if family in layer.weights else "" for *_, family in COLUMNS
    ]
    name = f"{layer.number:>3}  {layer.attention.upper()}, {layer.feed_forward}"
    return _aligned(name, [*cells, _percent(layer.alone), _percent(layer.together)])


def _predictions(quality: Quality) -> Iterator[str]:
    found = quality.predictions
    assert found.reference is not None and found.distance is not None
    yield (
        f"perplexity      {found.model.perplexity:.4f}, unquantized "
        f"{found.reference.perplexity:.4f}, over {found.model.tokens:,} tokens"
    )
    yield from show.distance(found.distance)


def _aligned(name: str, cells: Sequence[str]) -> str:
    return (f"{name:<{NAME}}" + "".join(f"{cell:>{WIDTH}}" for cell in cells)).rstrip()


def _percent(error: float) -> str:
    return f"{error:.2%}".removesuffix("%") if error else "0"
