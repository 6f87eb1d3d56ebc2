"""`mlx_kimi evaluate`: perplexity on a text, and how far a model is from another."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mlx_kimi.checkpoint.hub import local_folder
from mlx_kimi.cli import show
from mlx_kimi.cli.options import model_or_pocket, no_tune_option, read_text
from mlx_kimi.evaluation.evaluate import TOKENS, WINDOW, Evaluation, Prediction, evaluate


@click.command("evaluate")
@click.argument("model", required=False, metavar="[FOLDER|HUB-ID]")
@no_tune_option
@click.option(
    "--text",
    "file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text file to predict.",
)
@click.option(
    "--against",
    metavar="FOLDER|HUB-ID",
    help="The model to compare with, such as the unquantized one. It is read first, and let go.",
)
@click.option("--tokens", type=int, default=TOKENS, help="Tokens of the text.")
@click.option("--window", type=int, default=WINDOW, help="Tokens that are read together.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str | None, file: Path, against: str | None, tokens: int, window: int, as_json: bool
) -> None:
    """Measure how well a model predicts a text; lower is better.

    With --against, also the KL divergence from that model's predictions to this one's. Without
    MODEL, it is about the pocket model.
    """
    text = read_text(file)
    with show.prefill_progress() as progress:
        found = evaluate(
            local_folder(model_or_pocket(model)),
            text,
            local_folder(against) if against else None,
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
