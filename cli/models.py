"""`mlx_kimi pull`, `list` and `rm`: the models on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

import click

from mlx_kimi.checkpoint.files import Checkpoint
from mlx_kimi.checkpoint.hub import is_folder
from mlx_kimi.cli import show
from mlx_kimi.cli.listed import LINE, print_list
from mlx_kimi.errors import KimiError
from mlx_kimi.loading.fetch import fetched
from mlx_kimi.loading.kept_models import KeptModel, kept_model, kept_models
from mlx_kimi.loading.load import check_headers
from mlx_kimi.units import counted, human_size

NONE = "none yet: `mlx_kimi pull NAME` downloads one, `mlx_kimi convert` makes one"


def pull(name: str) -> None:
    if is_folder(name):
        raise KimiError(f"{name}: is a folder here; what is pulled has a name on the hub")
    check = partial(check_headers, may_be_too_large=True)  # to run here, but not to be converted
    folder = fetched(name, check, lambda line: click.echo(line, err=True))
    click.echo(folder)
    try:
        check_headers(folder, Checkpoint(folder))
    except KimiError as error:
        click.echo(str(error), err=True)


def list_models(as_json: bool) -> None:
    models = kept_models()
    size = human_size(sum(model.size for model in models))
    summary = f"{counted(len(models), 'model')}, {size}" if models else NONE
    print_list(_lines(models), summary, map(_json, models), as_json)


def _lines(models: Sequence[KeptModel]) -> Iterator[str]:
    width = max((len(model.name) for model in models), default=0)
    for model in models:
        changed = time.strftime("%Y-%m-%d", time.localtime(model.changed))
        problem = f"; does not load: {model.problem}" if model.problem else ""
        size = f"{human_size(model.size):>9}"
        yield f"{model.name:<{width}}  {size}  {changed}  {model.weights}{problem}"


def _json(model: KeptModel) -> dict[str, object]:
    return {
        "name": model.name,
        "folder": str(model.folder),
        "size": model.size,
        "changed": model.changed,
        "weights": model.weights,
        "problem": model.problem or None,
    }


def remove(names: tuple[str, ...], yes: bool) -> None:
    models = [kept_model(name) for name in dict.fromkeys(names)]  # all are there, or none goes
    if not yes and not sys.stdin.isatty():
        raise click.UsageError("--yes must be given where nobody can be asked")
    for model in models:
        what = f"{show.one_line(model.name, LINE)} ({human_size(model.size)})"
        if not yes and not click.confirm(f"remove {what}?", err=True):
            continue
        left = model.remove()
        click.echo(f"removed {what}", err=True)
        if left:
            kept = show.one_line(", ".join(path.name for path in left), LINE)
            click.echo(f"{model.folder} keeps what was not made by `convert`: {kept}", err=True)
