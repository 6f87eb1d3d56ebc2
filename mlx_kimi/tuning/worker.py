"""The child process that tries kernels: a request on stdin, one event a line on stdout.

A kernel that is new waits for a line on stdin, which says that its name is on the disk.

`python -m mlx_kimi.tuning.worker`. What hangs or crashes here takes nobody with it.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import mlx.core as mx

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.errors import KimiError
from mlx_kimi.metal_kernels.kernel import in_one_line
from mlx_kimi.tuning.events import Event, Failed, Trying
from mlx_kimi.tuning.probe import Probe
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
    asked = json.loads(sys.stdin.readline())
    allowed: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(allowed,), daemon=True).start()
    request = Request(**asked | {"limits": Limits(**asked["limits"])})

    def tell(event: Event) -> None:
        _tell(events, event)
        if isinstance(event, Trying) and event.kernel:
            allowed.get()  # until the kernel's name is on the disk

    try:
        config = ModelConfig.read(Path(request.folder))
        dtype = getattr(mx, request.dtype)
        Probe(config, dtype, request.off, request.limits, tell).run()
    except (KimiError, RuntimeError, ValueError) as error:
        _tell(events, Failed(in_one_line(str(error))))


def _listen(allowed: queue.SimpleQueue[str]) -> None:
    """Take the parent's leave to go on; without a parent nothing goes on, not even what hangs."""
    for line in sys.stdin:
        allowed.put(line)
    os._exit(1)


def _tell(events: TextIO, event: Event) -> None:
    events.write(json.dumps({"event": type(event).__name__, **asdict(event)}) + "\n")
    events.flush()


if __name__ == "__main__":
    main()
