"""`mlx_kimi tune`: which kernels run on this GPU, and in which shapes, measured here."""

from __future__ import annotations

import click

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.cli.given import model_or_pocket
from mlx_kimi.cli.progress import work
from mlx_kimi.cli.tuned import lines
from mlx_kimi.errors import KimiError
from mlx_kimi.loading.command_buffers import enlarge_command_buffers
from mlx_kimi.loading.fetch import headers_of
from mlx_kimi.loading.load import dtype_of
from mlx_kimi.metal_kernels.kernel import backend
from mlx_kimi.tuning.tune import tune, where_kept


def run(model: str | None, seconds: float) -> None:
    if backend() is None:
        raise KimiError("no kernels run here: there is no GPU, or MLX_KIMI_NO_KERNELS is set")
    enlarge_command_buffers()  # as a load does: the child inherits it
    folder, checkpoint = headers_of(model_or_pocket(model))  # (what is tried are random weights)
    config = ModelConfig.read(folder)
    with work() as doing:
        doing.at("trying the kernels on this GPU")
        stored = tune(
            folder,
            config,
            dtype_of(folder, checkpoint),
            lambda kernel: doing.at(f"trying {kernel}"),
            again=True,
            seconds=seconds,
        )
    for line in lines(stored):
        click.echo(line)
    click.echo(where_kept(stored))
