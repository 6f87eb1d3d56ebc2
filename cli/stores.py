"""`mlx_kimi cache list` and `cache wipe`: what `serve` stores of prompts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import click

from mlx_kimi.cli import show
from mlx_kimi.cli.listed import LINE, print_list
from mlx_kimi.errors import KimiError
from mlx_kimi.server.state_store import Store, stores, wipe
from mlx_kimi.units import counted, human_size


def list_stores(as_json: bool) -> None:
    found = stores()
    total = human_size(sum(store.size for store in found))
    summary = f"{total} of states, stored by `serve` (--cache-disk)"
    print_list(_lines(found), summary, map(_json, found), as_json)


def _lines(found: Sequence[Store]) -> Iterator[str]:
    width = max((len(store.model) for store in found), default=0)
    for store in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(store.used))
        states = counted(store.states, "state")
        yield f"{store.model:<{width}}  {used}  {states:>10}  {human_size(store.size):>9}"


def wipe_stores(models: tuple[str, ...]) -> None:
    found = stores()
    for model in models:
        if model not in {store.model for store in found}:
            raise KimiError(
                f"{model}: no states are stored of it; `mlx_kimi cache list` names them"
            )
    for store in found:
        if not models or store.model in models:
            wipe(store)
            what = f"{store.model}: {counted(store.states, 'state')}, {human_size(store.size)}"
            click.echo(f"deleted {show.one_line(what, LINE)}", err=True)


def _json(store: Store) -> dict[str, object]:
    return {
        "model": store.model,
        "folder": str(store.folder),
        "states": store.states,
        "size": store.size,
        "used": store.used,
    }
