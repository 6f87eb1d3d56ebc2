"""`mlx_kimi info`: what a model is, and what runs it here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

import click
import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_kimi.checkpoint.hub import is_folder
from mlx_kimi.checkpoint.tensors import tensors
from mlx_kimi.cli.given import model_or_pocket
from mlx_kimi.cli.progress import work
from mlx_kimi.cli.tuned import lines
from mlx_kimi.errors import KimiError
from mlx_kimi.loading.fetch import headers_of
from mlx_kimi.loading.kept_models import weights_in_words
from mlx_kimi.loading.load import load_model
from mlx_kimi.loading.memory import Machine, needs
from mlx_kimi.metal_kernels.kernel import OFF, backend, is_traced
from mlx_kimi.model.cache import check_latent_bits
from mlx_kimi.model.kda import KimiDeltaAttention
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.layers import MLP
from mlx_kimi.units import counted, human_size

PART, TOKENS = 20, 41  # columns
OPERATIONS = ("ops form", "kda_chunk", "naive_kda")  # forms without our kernels
LENGTHS = (4096, 32_768, 131_072)  # tokens of context
Implementation = tuple[str, str, str]  # how many tokens, what runs, why


def run(model: str | None, kernels: bool, context: int | None, latent_bits: int | None) -> None:
    check_latent_bits(latent_bits)
    named = model_or_pocket(model)
    with work() as doing:
        if is_folder(named):  # (else the hub's own bars show what it downloads)
            doing.at("reading headers")
        folder, checkpoint = headers_of(named)
        network = load_model(folder, lazy=True, checkpoint=checkpoint)
    if kernels:
        lines = _kernels(network)
    else:
        lines = chain(_facts(network), _memory(network, context, latent_bits))
    for line in list(lines):  # all of it, or an error
        click.echo(line)


def _memory(network: KimiLinear, context: int | None, latent_bits: int | None) -> Iterator[str]:
    config = network.config
    if context and context > config.model_max_length:
        raise KimiError(
            f"--context must be at most model_max_length = {config.model_max_length:,} "
            f"but is {context:,}"
        )
    parameters: list[Any] = tree_flatten(network.parameters())  # type: ignore[assignment]
    weights = sum(array.nbytes for _, array in parameters)
    wanted, machine = needs(config, weights, latent_bits), Machine.here()
    yield (
        f"memory        {human_size(wanted.weights)} weights, {human_size(wanted.state)} state, "
        f"{human_size(wanted.latent)} a token of context, about {human_size(wanted.work)} to work"
    )
    lengths = [n for n in LENGTHS if n < config.model_max_length] + [config.model_max_length]
    for length in lengths if context is None else [context]:
        total = wanted.at(length)
        fits = "fits" if total <= machine.limit else "does not fit"
        yield f"  {length:>11,} tokens  {human_size(total):>9}  {fits}"
    longest = wanted.longest(machine.limit, config.model_max_length)
    yield f"here          {machine}: " + (
        f"up to {longest:,} tokens" if longest else "it does not fit; a load says what would"
    )


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
    yield f"weights       {weights_in_words(config)}"
    yield f"context       {config.model_max_length:,} tokens"


def _kernels(network: KimiLinear) -> Iterator[str]:
    """One table of the model: parts of layers, by the tokens that they take at a time."""
    if backend() is None:
        yield (
            f"MLX's own operations run everything on this {mx.default_device().type.name.upper()}: "
            f"our kernels, which are faster, need a GPU, and {OFF} unset"
        )
        return
    yield "fast: our kernels; slow: MLX's operations, whose answers are as right"
    yield f"{OFF}=1 in the environment turns our kernels off"
    yield ""
    with network.choices.use():
        parts = _implementations(network)
    yield f"{'part':<{PART}}tokens at a time"
    for part, rows in parts.items():
        for number, (tokens, form, why) in enumerate(rows):
            said = f"slow  {why}" if form in OPERATIONS else f"fast  {form}"
            yield f"{'' if number else part:<{PART}}{tokens:<{TOKENS}}{said}"
    yield ""
    if is_traced():
        yield from _found_out(network)


def _found_out(network: KimiLinear) -> Iterator[str]:
    from mlx_kimi.tuning.stored import Stored, key_of  # here: pydantic takes a while

    stored = Stored.read(key_of(network.config, network.norm.weight.dtype))
    if stored is None:
        yield "not tried on this GPU yet: the first load does it, or `mlx_kimi tune`"
        return
    yield "found out on this GPU by `mlx_kimi tune`, or by the first load"
    yield from (f"  {line}" for line in lines(stored))


def _implementations(network: KimiLinear) -> dict[str, list[Implementation]]:
    """The choices of each kind of layer; layers that choose alike stand together."""
    alike: dict[tuple[str, tuple[Implementation, ...]], list[int]] = {}
    for number, layer in enumerate(network.layers, start=1):
        attention = "KDA" if isinstance(layer.self_attn, KimiDeltaAttention) else "MLA"
        for part, name in ((layer.self_attn, attention), (layer.mlp, "experts")):
            if not isinstance(part, MLP):
                alike.setdefault((name, tuple(part.implementations())), []).append(number)
    kinds = Counter(name for name, _ in alike)
    return {
        f"{name}, {counted(len(numbers), 'layer')}"
        if kinds[name] == 1
        else f"{name} of {', '.join(map(str, numbers))}": list(rows)
        for (name, rows), numbers in alike.items()
    }
