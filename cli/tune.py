"""`mlx_kimi tune`: which kernels run on this GPU, and in which shapes, measured here."""

from __future__ import annotations

import click
from rich.console import Console

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.hub import local_folder
from mlx_kimi.cli.options import model_or_pocket
from mlx_kimi.cli.tuned import lines
from mlx_kimi.errors import KimiError
from mlx_kimi.loading.command_buffers import enlarge_command_buffers
from mlx_kimi.loading.load import dtype_of
from mlx_kimi.metal_kernels.kernel import backend
from mlx_kimi.tuning.tune import tune, where_kept


@click.command("tune")
@click.argument("model", required=False, metavar="[FOLDER|HUB-ID]")
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=120.0,
    help="From then on nothing more is measured.",
)
def command(model: str | None, seconds: float) -> None:
    """Try each kernel on this GPU, and keep what is right and fastest for such a model.

    Each is compiled, compared with plain products and timed beside MLX's operations, with random
    weights of the model's shapes, in a process of its own. The first load of a model does it by
    itself, and measures no more after 30 seconds. Without MODEL, it is about the pocket model.
    """
    if backend() is None:
        raise KimiError("no kernels run here: there is no GPU, or MLX_KIMI_NO_KERNELS is set")
    enlarge_command_buffers()  # as a load does: the child inherits it
    folder = local_folder(model_or_pocket(model))
    config = ModelConfig.read(folder)
    with Console(stderr=True).status("trying the kernels on this GPU") as status:
        stored = tune(
            folder,
            config,
            dtype_of(folder),
            lambda kernel: status.update(f"trying {kernel}"),
            again=True,
            seconds=seconds,
        )
    for line in lines(stored):
        click.echo(line)
    click.echo(where_kept(stored))
