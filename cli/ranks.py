"""`mlx_kimi ranks`: what each of several machines would hold of a model, and how to start them."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from shlex import join, quote
from typing import Any

import click

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.cli.given import folder_of
from mlx_kimi.cli.options import Bytes
from mlx_kimi.defaults import CONTEXT
from mlx_kimi.errors import KimiError, OptionError
from mlx_kimi.loading.load import array_bytes
from mlx_kimi.loading.memory import Machine
from mlx_kimi.ranks.launched import SECRET
from mlx_kimi.ranks.shares import (
    BY_HEADS,
    BY_LAYERS,
    Share,
    by_memory,
    heads_share,
    of_gpu,
    parts_of,
    share_of,
)
from mlx_kimi.units import human_size
from mlx_kimi.user_files import JSON_BYTES, parsed_value, read_bytes, shown

COLUMNS = (6, 12, 11, 17, 14, 0)  # widths


def run(
    model: str | None,
    hostfile: Path | None,
    memory: str | None,
    split: str | None,
    latent_bits: int | None,
) -> None:
    hosts = None if hostfile is None else hosts_in(hostfile)
    memories = _memories(memory)
    if hosts is None and memories is None:
        raise click.UsageError("--memory 24GB,32GB says what each machine has; see also --hostfile")
    if hosts and memories and len(hosts) != len(memories):
        raise OptionError("memory", f"gives {len(memories)} machines, but {hostfile} {len(hosts)}")
    if memories is None:
        assert hosts is not None
        memories = [Machine.here().limit] * len(hosts)
        click.echo(f"each machine is taken to be like this one; {Machine.here()}", err=True)
    folder = folder_of(model, fits=False)
    config, sizes = ModelConfig.read(folder), array_bytes(folder)
    shares = _shares(config, sizes, split or BY_LAYERS, memories, latent_bits)
    for line in _table(config, shares, memories):
        click.echo(line)
    click.echo()
    click.echo(_launch_line(model, hostfile, hosts, split))


def _shares(
    config: ModelConfig,
    sizes: Mapping[str, int],
    split: str,
    memories: Sequence[int],
    latent_bits: int | None,
) -> list[Share]:
    if split == BY_HEADS:
        return [heads_share(config, sizes, len(memories), latent_bits)] * len(memories)
    parts = parts_of(split, config, len(memories)) or by_memory(config, sizes, memories)
    return [share_of(config, sizes, part, latent_bits) for part in parts]


def _memories(said: str | None) -> list[int] | None:
    """What the GPUs of these Macs may take."""
    if said is None:
        return None
    try:
        sizes = [Bytes().convert(each, None, None) for each in said.split(",")]
    except click.BadParameter as error:
        raise OptionError(
            "memory", f"must be sizes with commas between them: {error.message}"
        ) from None
    if len(sizes) < 2 or min(sizes) < 1:
        raise OptionError("memory", f"must be of two machines or more but is {said}")
    return [of_gpu(size) for size in sizes]


def hosts_in(file: Path) -> list[str]:
    """The first address of each machine in a hostfile of mlx.launch.

    Raises:
        KimiError: it is none, or of one machine.
    """
    said: Any = parsed_value(read_bytes(file, JSON_BYTES), file)
    hosts = said.get("hosts") if isinstance(said, dict) else said
    if not isinstance(hosts, list) or len(hosts) < 2:
        raise KimiError(f"{file}: must list two hosts or more, as mlx.launch reads them")
    found = []
    for number, host in enumerate(hosts):
        ips = host.get("ips") if isinstance(host, dict) and host.get("ssh") else None
        try:
            found.append(str(ipaddress.IPv4Address(ips[0])))  # type: ignore[index]
        except (TypeError, IndexError, KeyError, ValueError):
            raise KimiError(
                f'{file}: host {number} must have "ssh" and "ips", a list of IPv4 addresses, '
                f"but is {shown(host)}"
            ) from None
    return found


def _table(config: ModelConfig, shares: Sequence[Share], memories: Sequence[int]) -> Iterator[str]:
    most = config.model_max_length
    context = min(CONTEXT, most)
    yield _aligned("rank", "layers", "weights", f"at {context:,}", "GPU may take", "")
    for rank, (share, memory) in enumerate(zip(shares, memories, strict=True)):
        longest = share.needs.longest(memory, most)
        yield _aligned(
            str(rank),
            f"{share.part.start} to {share.part.stop - 1}",
            human_size(share.needs.weights),
            human_size(share.needs.at(context)),
            human_size(memory),
            f"fits up to {longest:,} tokens" if longest else "does not fit",
        )


def _aligned(*cells: str) -> str:
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, COLUMNS, strict=True)).rstrip()


def _launch_line(
    model: str | None, hostfile: Path | None, hosts: Sequence[str] | None, split: str | None
) -> str:
    """What to type: a secret is made by the shell, so that no file has it."""
    beyond = hosts is None or not ipaddress.IPv4Address(hosts[0]).is_loopback
    secret = f" --env {SECRET}=$(openssl rand -hex 16)" if beyond else ""
    command = ["mlx_kimi", "generate"]
    command += ["-m", str(model)] if model else []
    command += ["--split", split] if split else []
    where = quote(str(hostfile or "hosts.json"))
    return f"mlx.launch --backend ring --hostfile {where}{secret} -- {join(command)} TEXT"
