"""Many clients at once for minutes: whether anything is lost, and whether memory stays flat.

    python -m benchmarks.engine_clients [FOLDER] [--clients 200] [--seconds 600]

A tenth of the requests is cancelled at any moment. FOLDER is a model; else the one inside the
package.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import mlx.core as mx
import psutil

from mlx_kimi import load
from mlx_kimi.server.engine import Engine
from tests.engine_clients import run_clients

EVERY = 15  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=600)
    given = parser.parse_args()
    engine = Engine(load(given.folder)[0], tree_memory=64 << 20)
    engine.start()
    process, began, printed = psutil.Process(), time.monotonic(), [0]

    def beside() -> None:
        passed = time.monotonic() - began
        if passed > EVERY * printed[0]:
            printed[0] += 1
            status = engine.status()
            sizes = (process.memory_info().rss, mx.get_active_memory(), status.tree_bytes)
            whole, mlx, tree = (f"{size / 1e6:5.0f} MB" for size in sizes)
            print(
                f"{passed:5.0f} s: the process {whole}, MLX {mlx}, the tree {tree}; "
                f"{status.queued} wait, {status.reading} are read, {status.decoding} answered "
                f"of {status.counters.submitted:,}",
                flush=True,
            )

    sums = run_clients(engine, given.clients, seconds=given.seconds, beside=beside)
    engine.stop(0)
    counters = engine.status().counters
    different = {n: (v, getattr(counters, n)) for n, v in sums.items() if getattr(counters, n) != v}
    print(f"told: {sums}")
    print(f"counters that differ: {different or 'none'}")


if __name__ == "__main__":
    main()
