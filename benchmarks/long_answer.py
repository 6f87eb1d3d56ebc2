"""A long answer by the library: time a token and memory as it grows, with a budget and without.

    python -m benchmarks.long_answer [FOLDER] [--tokens 20000] [--budgets 0 1000 ...]

Each run is a process of its own. The answer goes on whatever its tokens say, at temperature 0. What
grows by itself is the context: an MLA layer's step reads all latents before it. The rest is flat.
On CPU that is H * (latent width) products twice a position, 0.7 to 1 ns each in the BLAS of MLX's
wheel for Linux: 2 to 3 microseconds a position in the pocket model's two MLA layers.

Processor time is that of all threads: beside it, time tells how busy the machine is otherwise.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import psutil

from mlx_kimi import load
from mlx_kimi.bundled import pocket_folder
from mlx_kimi.generation.decode import decode, prefill
from mlx_kimi.generation.sample import Sampler, Sampling
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.loading.budget import Budget

PARTS = 10  # rows of a table


def run(folder: Path, tokens: int, megabytes: int) -> None:
    """Answer, and print a row for each part; 0 megabytes: without a budget."""
    prompt = list(range(1, 17))
    context = len(prompt) + tokens
    model, _ = load(folder, Budget(megabytes * 10**6, context) if megabytes else None)
    state = TokenState(model, snapshot_every=None)
    hidden, _ = prefill(state, prompt)
    answer = decode(state, hidden, Sampler(Sampling(), prompt, model.config.vocab_size), tokens)
    for part in range(PARTS):
        began, busy = time.perf_counter(), time.process_time()
        count = sum(1 for _ in islice(answer, tokens // PARTS))
        each = 1e3 * (time.perf_counter() - began) / count
        work = 1e3 * (time.process_time() - busy) / count
        resident = psutil.Process().memory_info().rss / 1e6
        row = f"| {(part + 1) * count:,} | {each:.2f} ms | {work:.2f} ms | {resident:,.0f} MB |"
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=pocket_folder())
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--budgets", type=int, nargs="+", default=[0, 1000], help="MB; 0: none.")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        run(options.folder, options.tokens, options.child)
        return
    for budget in options.budgets:
        print(f"{budget:,} MB of budget" if budget else "no budget")
        print("| tokens | each | processor | resident |\n|---|---|---|---|", flush=True)
        command = [sys.executable, "-m", "benchmarks.long_answer", str(options.folder)]
        subprocess.run(
            [*command, "--tokens", str(options.tokens), "--child", str(budget)], check=True
        )


if __name__ == "__main__":
    main()
