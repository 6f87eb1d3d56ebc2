"""The program in a process of its own, and what a process took, seen from outside."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
