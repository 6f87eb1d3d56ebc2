"""What a process took, seen from outside."""

import subprocess
import time
from pathlib import Path


def peak_memory(process: subprocess.Popen[str]) -> int:
    """Bytes that `process` has had in memory at most, once it has ended. On Linux."""
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if "VmHWM:" in status:
            peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
        time.sleep(0.002)
    return peak
