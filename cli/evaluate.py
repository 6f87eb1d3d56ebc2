"""`mlx_kimi evaluate`: perplexity on a text, and how far a model is from another."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mlx_kimi.cli import show
from mlx_kimi.cli.given import folder_of, read_text
from mlx_kimi.cli.progress import work
from mlx_kimi.evaluation.evaluate import Evaluation, Prediction, evaluate


def run(
    file: Path, model: str | None, against: str | None, tokens: int, window: int, as_json: bool
) -> None:
    text = read_text(file)
    with work("reading", "tokens") as progress:
        found = evaluate(
            folder_of(model),
            text,
            folder_of(against) if against else None,
            tokens=tokens,
            window=window,
            progress=progress,
        )
    click.echo(json.dumps(found.json()) if as_json else "\n".join(_lines(found)))


def _lines(found: Evaluation) -> list[str]:
    lines = [_of("model", found.model)]
    if found.reference and found.distance:
        lines += [_of("against", found.reference), *show.distance(found.distance)]
    return lines


def _of(name: str, p: Prediction) -> str:
    return f"{name:<15} perplexity {p.perplexity:.4f} over {p.tokens:,} tokens"
