"""The machine, as a report of it begins."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version

import mlx.core as mx

from mlx_kimi.loading.command_buffers import enlarge_command_buffers


def machine() -> Iterator[str]:
    """Versions, the GPU as MLX knows it, and what is set for MLX, Metal and this program."""
    enlarge_command_buffers()  # (as `load_model` would: `device_info` starts the GPU)
    packages = ", ".join(f"{name} {version(name)}" for name in ("mlx_kimi", "mlx"))
    yield f"{packages}, Python {platform.python_version()}"
    yield f"{platform.platform()} {platform.mac_ver()[0]}".strip()
    yield ", ".join(f"{key} {value}" for key, value in mx.device_info().items())
    names = sorted(name for name in os.environ if name.startswith(("MLX_", "MTL_", "METAL_")))
    yield "set: " + (", ".join(f"{name}={os.environ[name]}" for name in names) or "nothing")
