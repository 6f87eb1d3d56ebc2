"""The program in a process of its own, what it took, and what this process holds."""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

PROGRAM = [sys.executable, "-m", "mlx_kimi"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


def run(
    *arguments: str | bytes | Path,
    stdin: str | bytes = "",
    env: Mapping[str, str] = ENVIRONMENT,
    timeout: float = 300,
) -> subprocess.CompletedProcess[Any]:
    """`mlx_kimi` with these arguments. Its output is text, or bytes where `stdin` is."""
    return subprocess.run(
        [*PROGRAM, *arguments],
        input=stdin,
        capture_output=True,
        text=isinstance(stdin, str),
        env=env,
        timeout=timeout,
    )


def peak_memory(process: subprocess.Popen[str]) -> int:
    """Bytes that `process` has had in memory at most, once it has ended. On Linux."""
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if "VmHWM:" in status:
            peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
        time.sleep(0.01)
    return peak


def live_memory() -> int:
    """Bytes of arrays here that something still refers to, with all submitted work done.

    What earlier tests left goes first, so that it cannot go while a test measures; and MLX's cache,
    since an array may be given a kept buffer that is larger than it needs.
    """
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()
