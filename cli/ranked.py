"""A command that may run on several ranks: what it loads on one, and what it refuses on several."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NoReturn

import click

from mlx_kimi.cli.given import model_or_pocket
from mlx_kimi.cli.progress import loading
from mlx_kimi.loading.budget import Budget
from mlx_kimi.loading.fetch import fetched
from mlx_kimi.loading.load import check_headers, load
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.ranks.launched import HOW, Launched
from mlx_kimi.ranks.shares import BY_LAYERS
from mlx_kimi.text.tokenizer import Tokenizer, load_tokenizer


def refuse_what_ranks_cannot(
    split: str | None, budget: Budget | None, speculate: str = "off"
) -> None:
    """Refuse --split in one process, and on several ranks what needs all layers in one."""
    if Launched.here() is None:
        if split is not None:
            raise click.UsageError(f"--split is for several ranks: {HOW}")
        return
    if budget is not None:
        raise click.UsageError("--memory-budget is for one process; ranks hold all experts")
    if speculate != "off":
        raise click.UsageError("--speculate needs all layers in one process; leave it out on ranks")


def load_here(
    folder: Path, budget: Budget | None, split: str | None
) -> tuple[KimiLinear, Tokenizer]:
    """The whole model, or as rank 0 of several with the layers that are its own."""
    launched = Launched.here()
    if launched is None:
        with loading():
            return load(folder, budget)
    from mlx_kimi.ranks.join import lead  # here: it imports what one process never uses

    tokenizer = load_tokenizer(folder)  # first: it fails in milliseconds
    with loading():
        return lead(launched, folder, split or BY_LAYERS, partial(click.echo, err=True)), tokenizer


def follow_with(launched: Launched, model: str | None) -> NoReturn:
    """As another rank than the first."""
    from mlx_kimi.ranks.join import follow

    check = partial(check_headers, may_be_too_large=True)
    follow(launched, lambda: fetched(model_or_pocket(model), check))
