"""`mlx_kimi info`: what a model is, and what runs it here."""

from __future__ import annotations

import math
from collections.abc import Iterator

import click
import mlx.core as mx

from mlx_kimi.cli.options import model_or_pocket
from mlx_kimi.hub import local_folder
from mlx_kimi.kda import KimiDeltaAttention
from mlx_kimi.layers import MLP
from mlx_kimi.load import load_model
from mlx_kimi.metal_kernels.kernel import OFF, backend
from mlx_kimi.model import KimiLinear
from mlx_kimi.names import tensors

Row = tuple[str, str, str]  # how many tokens, what runs, why


@click.command("info")
@click.argument("model", required=False, metavar="[FOLDER|HUB-ID]")
@click.option("--kernels", is_flag=True, help="Which kernels run on this machine, and why.")
def command(model: str | None, kernels: bool) -> None:
    """Say what a model is made of. Reads headers, no weights.

    Without MODEL, it is about the pocket model.
    """
    network = load_model(local_folder(model_or_pocket(model)), lazy=True)
    for line in _kernels(network) if kernels else _facts(network):
        click.echo(line)


def _facts(network: KimiLinear) -> Iterator[str]:
    config = network.config
    kinds = [layer.attention for layer in config.layers]
    experts = sum(layer.feed_forward == "moe" for layer in config.layers)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors(config))
    yield f"{parameters:,} parameters, {config.num_hidden_layers} layers"
    yield f"attention     {kinds.count('kda')} KDA and {kinds.count('mla')} MLA layers"
    yield (
        f"experts       {config.num_experts_per_token} of {config.num_experts} a token and "
        f"{config.num_shared_experts} shared, in {experts} layers"
    )
    q = config.quantization
    stored = f"{q.bits} bits, groups of {q.group_size}, {q.mode}" if q else "not quantized"
    yield f"weights       {stored}"
    yield f"context       {config.model_max_length:,} tokens"


def _kernels(network: KimiLinear) -> Iterator[str]:
    if backend() is not None:
        yield f"kernels run on {mx.default_device()}; {OFF}=1 in the environment turns them off"
    else:
        yield f"no kernels run on {mx.default_device()}"
    for name, rows in _forms(network).items():
        yield name
        for tokens, form, why in rows:
            yield f"  {tokens:<18} {form}: {why}"


def _forms(network: KimiLinear) -> dict[str, list[Row]]:
    """The choices of each kind of layer; layers that choose alike stand together."""
    alike: dict[tuple[str, tuple[Row, ...]], list[int]] = {}
    for number, layer in enumerate(network.layers, start=1):
        attention = "KDA" if isinstance(layer.self_attn, KimiDeltaAttention) else "MLA"
        for part, name in ((layer.self_attn, attention), (layer.mlp, "experts")):
            if not isinstance(part, MLP):
                alike.setdefault((name, tuple(part.forms())), []).append(number)
    return {
        f"{name} of layers {', '.join(map(str, numbers))}": list(rows)
        for (name, rows), numbers in alike.items()
    }
