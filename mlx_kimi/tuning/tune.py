"""Which kernels a model runs here: what is known, or else what a child process finds out, once."""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
from pydantic import TypeAdapter
from rich.console import Console

from mlx_kimi.backend import untried
from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.defaults import NO_TUNE
from mlx_kimi.metal_kernels.tuning import Choices, Tuning
from mlx_kimi.tuning.sample import Limits
from mlx_kimi.tuning.stored import Stored, alone, key_of, path_of
from mlx_kimi.tuning.worker import Request

WORKER = (sys.executable, "-m", "mlx_kimi.tuning.worker")
HANGS = 20.0  # seconds after which a kernel that was to run for the first time counts as hanging
SILENCE = 120.0  # the same of MLX's own operations, some of which are compiled for long
SECONDS = 30.0  # after which nothing more is measured at a first load
ATTEMPTS = 3  # starts that try again where no worker could prove its kernels
LEFT_ALONE = 5.0  # seconds after which a child that was killed and does not end is left to itself
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
        said = [f"{kernel} is off: {why}" for kernel, why in stored.off.items()]
        if not stored.proven:
            said += [f"the kernels were not all tried: {note}" for note in stored.notes]
        elif not stored.is_kept:
            said.append(where_kept(stored))
        for line in said:
            console.print(line, highlight=False, markup=False)
    return stored.choices


def where_kept(stored: Stored) -> str:
    """In which file it is, or that it is in none."""
    path = path_of(stored.key)
    if stored.is_kept:
        return f"kept in {path}"
    return f"{path}: cannot be written; the next start tries again"


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

    One process at a time does so for a key; another one waits, and takes what was found.

    Args:
        show: is told the kernel that is tried.
        again: forget what is known.
        seconds: from then on nothing more is measured. All kernels are tried however long it takes.
        worker: the program that tries kernels; tests give one with planted faults.
    """
    key = key_of(config, dtype)
    with alone(key), _signals_are_exceptions():
        before = Stored.read(key)
        if before and before.complete and not again:
            return before
        stored = Stored.new(key) if before is None or again else before
        if stored.trying:  # nobody else is at it: whoever was went down with it
            why = "it did not return when it first ran here; `mlx_kimi tune` tries it again"
            stored.off[stored.trying], stored.trying = why, None
        try:
            _run_workers(folder, dtype, stored, show, limits, worker, time.monotonic() + seconds)
        except BaseException:  # Ctrl-C says nothing of a kernel, nor of what was known before
            kept = before if before and before.complete else stored
            kept.off |= stored.off
            kept.trying = None
            kept.write()
            raise
        stored.trying = None
        stored.attempts += 1
        stored.complete = stored.proven or stored.attempts >= ATTEMPTS
        stored.write()
    return stored


def _run_workers(
    folder: Path,
    dtype: mx.Dtype,
    stored: Stored,
    show: Callable[[str], None],
    limits: Limits,
    worker: Sequence[str],
    end: float,
) -> None:
    for _ in range(RESTARTS + 1):
        request = Request(str(folder), str(dtype).removeprefix("mlx.core."), stored.off, limits)
        if _one_worker(request, stored, show, worker, end):
            return
    stored.notes.append("the worker was started too often; what it found is kept")


def _one_worker(
    request: Request,
    stored: Stored,
    show: Callable[[str], None],
    command: Sequence[str],
    end: float,
) -> bool:
    """Run one to its end, or until time is over; whether it is of no use to start another."""
    stored.notes.clear()
    stored.proven, started, off_before = False, time.monotonic(), len(stored.off)
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"MLX_ENABLE_TF32": "0"},  # (NVIDIA: else float32 products are not)
            start_new_session=True,  # Ctrl-C is this process's to act on
        )
    except OSError as error:
        stored.notes.append(f"the worker cannot be started: {error.strerror}")
        return True
    assert child.stdin and child.stdout
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(child.stdout, lines), daemon=True)
    reader.start()
    try:
        _send(child.stdin, json.dumps(asdict(request)))
        while True:
            silent = HANGS if stored.trying else SILENCE
            left = max(end - time.monotonic(), 0) if stored.proven else math.inf
            line = _next(lines, min(silent, left))
            if line is None:
                if left < silent:
                    stored.notes.append("time was over; what is not listed was not measured")
                    return True
                return _blamed(stored, f"it did not return within {silent:.0f} s")
            if not line:
                return _ended(stored, child.wait(), off_before)
            if not line.endswith(b"\n"):
                continue
            match _take(json.loads(line), stored, show):
                case "Trying" if stored.trying:
                    _send(child.stdin, "")  # its mark is on the disk: now it may run
                case "Failed":
                    return len(stored.off) == off_before
                case "Done":
                    stored.notes.append(f"found out in {time.monotonic() - started:.0f} s")
                    return True
    except BrokenPipeError:
        return _ended(stored, child.wait(), off_before)
    finally:
        child.kill()
        with suppress(subprocess.TimeoutExpired):  # (a driver may hold it for ever)
            child.wait(LEFT_ALONE)
            reader.join()
            child.stdout.close()


def _send(stream: IO[bytes], text: str) -> None:
    stream.write(text.encode() + b"\n")
    stream.flush()


def _next(lines: queue.SimpleQueue[bytes], seconds: float) -> bytes | None:
    """The next line; empty at the end; None: there is none."""
    for timeout in (seconds, min(seconds, 0.5)):  # (again, if this process slept meanwhile)
        with suppress(queue.Empty):
            return lines.get(timeout=timeout)
    return None


def _read(stream: IO[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(b"")


def _blamed(stored: Stored, how: str) -> bool:
    """Leave out the kernel that was tried, if one was: of no use to start another worker if not."""
    if stored.trying is None or stored.proven:  # (its default form has run: it is another form)
        tried = f"{stored.trying} in another form: " if stored.trying else ""
        stored.notes.append(f"the worker did not finish: {tried}{how}")
        return True
    stored.off.setdefault(stored.trying, how)
    stored.trying = None
    stored.write()
    return False


def _ended(stored: Stored, code: int, off_before: int) -> bool:
    """A worker ended before its answer."""
    how = f"its process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
    if code == -signal.SIGKILL:  # the system's, when memory is short: no kernel's fault
        stored.trying = None
    return _blamed(stored, how) and len(stored.off) == off_before


@contextmanager
def _signals_are_exceptions() -> Iterator[None]:
    """Within, a closed terminal or `kill` ends the work as Ctrl-C does: no kernel is blamed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    elif name in ("Note", "Failed"):
        stored.notes.append(event["text"])
    elif name == "Chosen":
        stored.tuning, stored.proven = _TUNING.validate_python(event["tuning"]), True
    return name
