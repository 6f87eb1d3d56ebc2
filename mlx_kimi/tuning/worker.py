"""The child process that tries kernels: a request on stdin, one event a line on stdout.

`python -m mlx_kimi.tuning.worker`. What hangs or crashes here takes nobody with it.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import mlx.core as mx

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.tuning.probe import Event, Probe
from mlx_kimi.tuning.sample import Limits

CACHE = 1 << 26  # bytes of freed memory that MLX may keep, beside what is in use


@dataclass(frozen=True)
class Request:
    """What is to be tried."""

    folder: str  # of the model
    dtype: str
    off: dict[str, str]  # kernels that are known not to run, and why
    limits: Limits


def main() -> None:
    """Answer one request."""
    # What MLX or a compiler prints is no event.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    mx.set_cache_limit(CACHE)
    asked = json.load(sys.stdin)
    request = Request(**asked | {"limits": Limits(**asked["limits"])})
    config = ModelConfig.read(Path(request.folder))
    dtype = getattr(mx, request.dtype)
    Probe(config, dtype, request.off, request.limits, lambda event: _tell(events, event)).run()


def _tell(events: TextIO, event: Event) -> None:
    events.write(json.dumps({"event": type(event).__name__, **asdict(event)}) + "\n")
    events.flush()


if __name__ == "__main__":
    main()
