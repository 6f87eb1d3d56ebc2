"""What `mlx.launch` says to a process in its environment: who it is, and where the others are."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_kimi.errors import KimiError
from mlx_kimi.user_files import JSON_BYTES, parsed_value, read_bytes, shown

SECRET = "MLX_KIMI_RANKS_SECRET"
LEAST_SECRET = 16  # characters
HOW = "mlx.launch starts ranks, and `mlx_kimi ranks` prints the line"


@dataclass(frozen=True)
class Launched:
    """One of several ranks.

    Attributes:
        backend: of `mx.distributed`: ring, jaccl or nccl.
        hosts: of each rank, as far as it is known; rank 0's is where control listens.
        port: the first of `size - 1` ports for control, at rank 0: one for each other rank.
        secret: what connections beyond this machine are encrypted with; None: there are none.
    """

    rank: int
    size: int
    backend: str
    hosts: tuple[str, ...]
    port: int
    secret: str | None = None

    @staticmethod
    def here(environment: Mapping[str, str] = os.environ) -> Launched | None:
        """This process, if it is one of several.

        Raises:
            KimiError: what the environment says is incomplete or out of range.
        """
        if "MLX_RANK" not in environment:
            return None
        for name, read in (("MLX_HOSTFILE", _ring), ("MLX_IBV_DEVICES", _jaccl)):
            if environment.get(name):
                backend, hosts, port = read(environment)
                break
        else:
            if "NCCL_HOST_IP" not in environment:
                return None
            backend, hosts, port = _nccl(environment)
        size = len(hosts)
        rank = _number(environment, "MLX_RANK", range(size))
        if size == 1:
            return None
        if backend == "nccl" and size > 2:
            raise KimiError(
                f"NCCL takes 2 ranks here, as MLX cannot send by it, but there are {size}"
            )
        return Launched(rank, size, backend, hosts, port, _secret(environment, hosts[0]))

    def name(self, rank: int) -> str:
        """A rank for a message: rank 1 (10.0.0.2)."""
        return f"rank {rank} ({self.hosts[rank]})" if self.hosts[rank] else f"rank {rank}"


def _ring(environment: Mapping[str, str]) -> tuple[str, tuple[str, ...], int]:
    file = Path(environment["MLX_HOSTFILE"])
    text = read_bytes(file, JSON_BYTES)
    ranks: Any = parsed_value(text, file) if text.strip() else [["127.0.0.1:0"]]
    if (
        not isinstance(ranks, list)
        or not ranks
        or not all(isinstance(r, list) and r for r in ranks)
    ):
        raise KimiError(f"{file}: must be a list of ranks, each a list of IP:PORT")
    addresses = [[_address(file, each) for each in of_rank] for of_rank in ranks]
    # The ring's ports follow each other, whatever the machine: ours come after all of them.
    port = 1 + max(port for of_rank in addresses for _, port in of_rank)
    return "ring", tuple(of_rank[0][0] for of_rank in addresses), port


def _jaccl(environment: Mapping[str, str]) -> tuple[str, tuple[str, ...], int]:
    file = Path(environment["MLX_IBV_DEVICES"])
    ranks: Any = parsed_value(read_bytes(file, JSON_BYTES), file)
    if not isinstance(ranks, list) or not ranks:
        raise KimiError(f"{file}: must be a list of ranks")
    host, port = _address("MLX_JACCL_COORDINATOR", environment.get("MLX_JACCL_COORDINATOR", ""))
    return "jaccl", (host, *("" for _ in ranks[1:])), port + 1


def _nccl(environment: Mapping[str, str]) -> tuple[str, tuple[str, ...], int]:
    size = _number(environment, "MLX_WORLD_SIZE", range(1, 1025))
    port = _number(environment, "NCCL_PORT", range(1, 65_535))
    where = f"{environment['NCCL_HOST_IP']}:{port}"
    host, _ = _address("NCCL_HOST_IP", where)
    return "nccl", (host, *("" for _ in range(size - 1))), port + 1


def _number(environment: Mapping[str, str], name: str, allowed: range) -> int:
    said = environment.get(name, "")
    if not (said.isascii() and said.isdigit() and int(said) in allowed):
        limits = f"a number from {allowed.start} to {allowed.stop - 1}"
        raise KimiError(f"{name} in the environment must be {limits} but is {shown(said)}")
    return int(said)


def _address(where: object, said: Any) -> tuple[str, int]:
    host, _, port = said.rpartition(":") if isinstance(said, str) else ("", "", "")
    try:
        host = str(ipaddress.IPv4Address(host))
    except ValueError:
        raise KimiError(f"{where}: must have IP:PORT but has {shown(said)}") from None
    if not (port.isascii() and port.isdigit() and int(port) < 65_000):
        raise KimiError(f"{where}: the port must be below 65000 but is {shown(port)}")
    return host, int(port)


def _secret(environment: Mapping[str, str], host: str) -> str | None:
    said = environment.get(SECRET)
    if said is None and ipaddress.IPv4Address(host).is_loopback:
        return None
    if said is None or len(said) < LEAST_SECRET:
        raise KimiError(
            f"{SECRET} must be {LEAST_SECRET} characters or more on all ranks, as rank 0 at {host} "
            "is reached by the network; `mlx_kimi ranks` prints a line with one"
        )
    return said
