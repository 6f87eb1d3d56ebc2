"""Converts a checkpoint of full-width layers: is the stated memory held, are the bytes the same?

    python -m benchmarks.convert_large NEW_FOLDER [--layers 2] [--kills 20] [--pairs 3]

Makes a random checkpoint in NEW_FOLDER (5.4 GB with two layers), converts it to 4 bits once without
interruption and once killed (-9) at random moments, compares every file, and times the conversion
against the same one without threads, in turns. All that it made is deleted in the end.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

CONVERT = "from mlx_kimi.cli.main import cli; cli()"
# The same work in one thread: what is ahead is computed when it is asked for.
SERIAL = """
from contextlib import contextmanager
from mlx_kimi.convert import write
@contextmanager
def ahead(function, items, count):
    yield map(function, items)
write.ahead = ahead
"""
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


class Run(NamedTuple):
    """One process, seen from outside."""

    seconds: float
    peak: int  # resident bytes at most, as the kernel counts them
    ended: bool  # by itself
    said: str  # on stderr


def run(source: Path, out: Path, limit: float | None = None, before: str = "") -> Run:
    """Convert in a process of its own, which is killed (-9) after `limit` seconds."""
    said = out.with_name("stderr.txt")
    with said.open("w") as stderr:
        command = [sys.executable, "-c", before + CONVERT, "convert", "-m", str(source), str(out)]
        began = time.monotonic()
        process = subprocess.Popen(command, stderr=stderr)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            seconds = time.monotonic() - began
            if pid:
                break
            if limit is not None and seconds > limit:
                process.kill()
                limit = None
            time.sleep(0.002)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, -9):
        sys.exit(f"the conversion failed: {said.read_text()}")
    peak = usage.ru_maxrss * MAXRSS_UNIT
    return Run(seconds, peak, process.returncode == 0, said.read_text())


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file."""
    result = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            result[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return result


def stated(said: str) -> float:
    """Bytes of memory that the conversion said it takes at most."""
    found = re.search(r"at most ([\d.]+) (GB|MB) of memory", said)
    assert found, said
    return float(found[1]) * {"GB": 1e9, "MB": 1e6}[found[2]]


def forget(folder: Path) -> None:
    """Drop a folder's pages from the cache where the system lets us, so that they are read anew."""
    if hasattr(os, "posix_fadvise"):
        for path in folder.iterdir():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def whole_run(source: Path, out: Path) -> float:
    """One conversion without interruption; its seconds."""
    first = run(source, out)
    budget = stated(first.said)
    size = sum(path.stat().st_size for path in source.iterdir())
    print(first.said.strip())
    print(f"source {size / 1e9:.2f} GB; peak memory {first.peak / 1e9:.3f} GB of the process")
    assert first.peak < budget < size
    for name, digest in digests(out).items():
        print(f"  {digest}  {name}")
    return first.seconds


def killed_runs(source: Path, out: Path, kills: int, seconds: float, seed: int) -> None:
    """Conversions killed at random moments, until `kills` were and the last one is whole."""
    moments, peaks, resumed, results = random.Random(seed), [], 0, 0
    expected = digests(out)
    shutil.rmtree(out)
    done = 0
    while done < kills or not out.exists():
        if out.exists():
            shutil.rmtree(out)
        limit = moments.uniform(0.3, 1 + 3 * seconds / kills) if done < kills else None
        each = run(source, out, limit)
        peaks.append(each.peak)
        resumed += "going on" in each.said
        done += not each.ended
        if out.exists():
            results += 1
            assert digests(out) == expected, "the bytes differ"
    print(
        f"{done} kills, {resumed} runs went on from where one was killed, {results} whole results, "
        f"every file's sha256 as without interruption; peak memory {max(peaks) / 1e9:.3f} GB"
    )


def compare(source: Path, out: Path, pairs: int) -> None:
    """Seconds with threads and without, in turns, the source read from the disk."""
    taken: dict[str, list[float]] = {"serial": [], "threads": []}
    for _ in range(pairs):
        for name, before in (("serial", SERIAL), ("threads", "")):
            shutil.rmtree(out, ignore_errors=True)
            forget(source)
            taken[name].append(run(source, out, before=before).seconds)
            print(f"  {name} {taken[name][-1]:.1f} s")
    medians = {name: statistics.median(each) for name, each in taken.items()}
    print(f"serial / threads: {medians['serial'] / medians['threads']:.2f} (medians of {pairs})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists; it must be a new folder, which is deleted again")
    needed = (2 + 3.7 * arguments.layers) * 1e9
    arguments.folder.mkdir(parents=True)
    try:
        free = shutil.disk_usage(arguments.folder).free
        if free < needed:
            sys.exit(
                f"{arguments.folder}: needs {needed / 1e9:.0f} GB of disk, {free / 1e9:.0f} free"
            )
        source, out = arguments.folder / "source", arguments.folder / "out"
        # In a process of its own: a child's peak counts that of the process it was forked from.
        make = [sys.executable, "-m", "benchmarks.large_checkpoint", str(source)]
        subprocess.run([*make, str(arguments.layers)], check=True)
        seconds = whole_run(source, out)
        killed_runs(source, out, arguments.kills, seconds, arguments.seed)
        compare(source, out, arguments.pairs)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
