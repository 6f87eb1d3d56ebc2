"""Which kernels a model runs here: what is known, or else what a child process finds out, once."""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from pydantic import TypeAdapter
from rich.console import Console

from mlx_kimi.backend import untried
from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.defaults import NO_TUNE
from mlx_kimi.metal_kernels.tuning import Choices, Tuning
from mlx_kimi.tuning.sample import Limits
from mlx_kimi.tuning.stored import Stored, key_of
from mlx_kimi.tuning.worker import Request

WORKER = (sys.executable, "-m", "mlx_kimi.tuning.worker")
HANGS = 20.0  # seconds after which a kernel that was to run for the first time counts as hanging
SILENCE = 120.0  # the same of MLX's own operations, some of which are compiled for long
SECONDS = 30.0  # after which nothing more is measured at a first load
RESTARTS = 13  # as many as there are operators: each loses at least one kernel

_TUNING = TypeAdapter(Tuning)


def known_choices(config: ModelConfig, dtype: mx.Dtype) -> Choices:
    """What has been found out before, or the defaults; tries nothing."""
    stored = Stored.read(key_of(config, dtype))
    return stored.choices if stored else Choices.default()


def choices_for(folder: Path, config: ModelConfig, dtype: mx.Dtype) -> Choices:
    """What has been found out before; else it is found out now, and named on the screen.

    Not where MLX_KIMI_NO_TUNE is set in the environment.
    """
    if os.environ.get(NO_TUNE):
        return known_choices(config, dtype)
    stored = Stored.read(key_of(config, dtype))
    if stored is None or not stored.complete:
        console = Console(stderr=True)
        if newer := untried():
            console.print(newer, highlight=False, markup=False)
        told = "trying the kernels on this GPU, once"
        if not console.is_terminal:
            console.print(f"{told}; `mlx_kimi tune` says what it found", highlight=False)
        with console.status(told) as status:
            stored = tune(folder, config, dtype, lambda kernel: status.update(f"{told}: {kernel}"))
        for kernel, why in stored.off.items():
            console.print(f"{kernel} is off: {why}", highlight=False, markup=False)
    return stored.choices


def tune(
    folder: Path,
    config: ModelConfig,
    dtype: mx.Dtype,
    show: Callable[[str], None],
    again: bool = False,
    seconds: float = SECONDS,
    limits: Limits = Limits(),  # noqa: B008
    worker: Sequence[str] = WORKER,
) -> Stored:
    """Find out what runs here, go on from what an unfinished try has found, and keep it.

    Args:
        show: is told the kernel that is tried.
        again: forget what is known.
        seconds: from then on nothing more is measured. All kernels are tried however long it takes.
        worker: the program that tries kernels; tests give one with planted faults.
    """
    key = key_of(config, dtype)
    stored = None if again else Stored.read(key)
    if stored is None or stored.complete:
        stored = Stored.new(key)
    if stored.trying:
        why = "it did not return when it first ran here; `mlx_kimi tune` tries it again"
        stored.off[stored.trying], stored.trying = why, None
    end = time.monotonic() + seconds
    for _ in range(RESTARTS + 1):
        request = Request(str(folder), str(dtype).removeprefix("mlx.core."), stored.off, limits)
        if _one_worker(request, stored, show, worker, end):
            break
    else:
        stored.notes.append("the worker was started too often; what it found is kept")
    stored.complete, stored.trying = True, None
    stored.write()
    return stored


def _one_worker(
    request: Request,
    stored: Stored,
    show: Callable[[str], None],
    command: Sequence[str],
    end: float,
) -> bool:
    """Run one to its end, or until time is over; whether it is of no use to start another."""
    stored.notes.clear()
    started = time.monotonic()
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"MLX_ENABLE_TF32": "0"},  # (NVIDIA: else products of float32 are not)
        start_new_session=True,  # Ctrl-C is this process's to act on
    )
    assert child.stdin and child.stdout
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(child.stdout, lines), daemon=True)
    reader.start()
    all_right = False  # all kernels have been tried, and what follows only measures
    try:
        child.stdin.write(json.dumps(asdict(request)).encode())
        child.stdin.close()
        while True:
            silent = HANGS if stored.trying else SILENCE
            left = max(end - time.monotonic(), 0) if all_right else math.inf
            try:
                line = lines.get(timeout=min(silent, left))
            except queue.Empty:
                if left < silent:
                    stored.notes.append("time was over; what is not listed was not measured")
                    return True
                return _ended(stored, f"it did not return within {silent:.0f} s")
            if line is None:
                code = child.wait()
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                return _ended(stored, f"its process ended with {how}")
            if not line.endswith(b"\n"):
                continue
            event = _take(json.loads(line), stored, show)
            all_right |= event == "Chosen"
            if event == "Done":
                stored.notes.append(f"found out in {time.monotonic() - started:.0f} s")
                return True
    except BrokenPipeError:
        return _ended(stored, "its process ended at once")
    except BaseException:  # Ctrl-C says nothing of a kernel
        stored.trying = None
        stored.write()
        raise
    finally:
        child.kill()
        child.wait()
        reader.join()
        child.stdout.close()


def _read(stream: Any, lines: queue.SimpleQueue[bytes | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _ended(stored: Stored, how: str) -> bool:
    """A worker ended before its answer: the kernel that it tried is off, if it tried one."""
    if stored.trying is None:
        stored.notes.append(f"the worker did not finish: {how}")
        return True
    stored.off.setdefault(stored.trying, how)
    stored.trying = None
    stored.write()
    return False


def _take(event: dict[str, Any], stored: Stored, show: Callable[[str], None]) -> str:
    """Note what a worker tells; the event's name."""
    name: str = event.pop("event")
    if name == "Trying":
        stored.trying = event["kernel"]
        stored.write()  # before it runs: what never returns is known at the next start
        if stored.trying:
            show(stored.trying)
    elif name == "Off":
        stored.off[event["kernel"]] = event["why"]
        stored.write()
    elif name == "Note":
        stored.notes.append(event["text"])
    elif name == "Chosen":
        stored.tuning = _TUNING.validate_python(event["tuning"])
    return name
