"""`mlx_kimi quantize`: `convert` by the name that suits a folder in the MLX layout."""

from __future__ import annotations

import click

from mlx_kimi.cli import convert

HELP = """Quantize SRC, an unquantized folder in the MLX layout, to the new folder OUT.

SRC is what `convert --no-quantize` or mlx-lm wrote. This is `convert` by another name: what is
interrupted is kept in OUT.partial, and the same command goes on from there.
"""

command = click.Command(
    "quantize",
    callback=convert.command.callback,
    params=convert.command.params,
    help=HELP,
    epilog=convert.command.epilog,
)
