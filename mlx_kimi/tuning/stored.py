"""What was found out about one GPU and one model's shapes: a file in the user's cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from pydantic import TypeAdapter, ValidationError

import mlx_kimi.metal_kernels as kernels
from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.tensors import tensors
from mlx_kimi.durable import not_through_a_link, write_bytes_durably
from mlx_kimi.errors import KimiError
from mlx_kimi.metal_kernels.tuning import Choices, Tuning, default_tuning
from mlx_kimi.model.random_weights import stored_quantization
from mlx_kimi.user_cache import cache_folder
from mlx_kimi.user_files import read_bytes

FORMAT = 2


@dataclass
class Stored:
    """What is known so far. `complete`: it is not tried again."""

    key: dict[str, str]
    tuning: Tuning
    format: int = FORMAT
    complete: bool = False
    proven: bool = False  # all kernels that are not off have run, and were right
    attempts: int = 0
    trying: str | None = None  # a kernel that was about to run: it counts as bad until it has
    off: dict[str, str] = field(default_factory=dict)  # kernels that do not run, and why
    notes: list[str] = field(default_factory=list)  # what was measured

    @property
    def choices(self) -> Choices:
        """What runs: the defaults, as far as nothing else is known."""
        trying = {self.trying: "it has not returned yet"} if self.trying else {}
        return Choices(self.tuning, trying | self.off)

    @staticmethod
    def new(key: dict[str, str]) -> Stored:
        """Nothing is known yet."""
        return Stored(key, default_tuning())

    @staticmethod
    def read(key: dict[str, str]) -> Stored | None:
        """What a file says of this key; None: there is none, or it is damaged, foreign or older."""
        try:
            found = _ADAPTER.validate_json(read_bytes(path_of(key)), strict=False)
        except (KimiError, ValidationError):
            return None
        return found if found.key == key and found.format == FORMAT else None

    @property
    def is_kept(self) -> bool:
        """Whether the next start finds it."""
        return Stored.read(self.key) == self

    def write(self) -> None:
        """Keep it. A folder that cannot be written costs only that it is found out again."""
        path = path_of(self.key)
        text = json.dumps(asdict(self), indent=1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_durably(path, text.encode())
        except OSError:
            return


@contextmanager
def alone(key: dict[str, str]) -> Iterator[None]:
    """Within, no other process finds out about this key; one that is at it is waited for."""
    path = path_of(key).with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "a", opener=not_through_a_link)
    except OSError:  # nothing can be kept there, and nobody can disturb it
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


_ADAPTER = TypeAdapter(Stored)


def path_of(key: dict[str, str]) -> Path:
    """The file of a key."""
    return cache_folder() / "tuning" / f"{_digest(key)}.json"


def key_of(config: ModelConfig, dtype: mx.Dtype) -> dict[str, str]:
    """What the answers depend on: the GPU, the system, MLX, our kernels and the model's shapes."""
    device: dict[str, Any] = mx.device_info()
    names = ("device_name", "architecture", "compute_capability_major", "memory_size")
    return {
        "gpu": ", ".join(str(device[name]) for name in names if name in device),
        "system": f"{platform.system()} {platform.release()}",
        "mlx": version("mlx"),
        "kernels": _texts(),
        "model": _digest(sorted(_shapes(config))),
        "dtype": str(dtype).removeprefix("mlx.core."),
    }


@cache
def _texts() -> str:
    """A digest of all that decides what our kernels do."""
    digest = hashlib.sha256()
    for file in sorted(Path(kernels.__file__).parent.iterdir()):
        if file.suffix in (".metal", ".h", ".py"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _shapes(config: ModelConfig) -> set[str]:
    """Of each kind of layer's tensors: shape and format."""
    return {
        repr((tensor.name.split(".", 3)[-1], tensor.shape, stored_quantization(tensor, config)))
        for tensor in tensors(config)
    } | {repr((config.num_experts_per_token, config.num_expert_group, config.topk_group))}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
