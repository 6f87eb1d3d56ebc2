"""The smallest memory budgets that are accepted, and what the runs then take.

    python -m benchmarks.budget [FOLDER] [--contexts N ...] [--prefill-steps N ...] [--tokens N]

Each run is a process of its own that fills its context: a prompt of random tokens, and an answer.
The peak is that of the whole process, as the system counts it (VmHWM, so on Linux). Exit 1: a
budget was exceeded, or is more than 1.3 times the peak.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from mlx_kimi import load, stream_generate
from mlx_kimi.bundled import pocket_folder
from mlx_kimi.errors import KimiError
from mlx_kimi.loading.budget import Budget

RATIO = 1.3


def run(folder: Path, budget: Budget, tokens: int) -> None:
    """Answer with `tokens` tokens, of which the last fills the context; print the peak in bytes."""
    model, tokenizer = load(folder, budget)
    context = budget.tokens(model.config)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, model.config.vocab_size, context - tokens).tolist()
    step = budget.prefill_step
    for _ in stream_generate(model, tokenizer, prompt, max_tokens=tokens, prefill_step=step):
        pass
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024)


def least(folder: Path, budget: Budget) -> int:
    """The bytes that the refusal of none names."""
    try:
        load(folder, budget)
    except KimiError as error:
        if found := re.search(r"make ([\d,]+) MB", str(error)):
            return int(found[1].replace(",", "")) * 10**6
        raise
    raise AssertionError("a budget of nothing was accepted")


def measured(folder: Path, context: int, step: int, tokens: int, memory: int = 0) -> int:
    """What a process prints that is asked for the least budget, or runs in `memory`."""
    command = [sys.executable, "-m", "benchmarks.budget", str(folder), "--child", str(memory)]
    options = ["--contexts", str(context), "--prefill-steps", str(step), "--tokens", str(tokens)]
    return int(subprocess.run(command + options, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=pocket_folder())
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048, 8192])
    parser.add_argument("--prefill-steps", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        (context,), (step,) = options.contexts, options.prefill_steps
        budget = Budget(options.child, context, prefill_step=step)
        if options.child:
            run(options.folder, budget, options.tokens)
        else:
            print(least(options.folder, budget))
        return
    wrong = 0
    print("| context | prefill step | smallest budget | peak of the process | ratio |")
    print("|---|---|---|---|---|")
    for context in options.contexts:
        for step in options.prefill_steps:
            if step > context > min(options.prefill_steps):
                continue
            given = options.folder, context, step, options.tokens
            memory = measured(*given)
            peak = measured(*given, memory)
            wrong += not peak <= memory <= RATIO * peak
            sizes = f"{memory / 1e6:,.0f} MB | {peak / 1e6:,.0f} MB"
            print(f"| {context:,} | {step:,} | {sizes} | {memory / peak:.2f} |", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
