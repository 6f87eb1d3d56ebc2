"""A folder whole in memory, and with its experts in slots: speeds, hits, and the same bits.

    python -m benchmarks.streaming FOLDER [--tokens N] [--repeats N] [--slots N ...]

The tokens are the same in every run and repeat, so that from the second on all experts are there
if the slots hold them: that is what slots cost when nothing is read. The first repeat tells hits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.loading.budget import Budget
from mlx_kimi.loading.command_buffers import enlarge_command_buffers
from mlx_kimi.loading.load import load_model
from mlx_kimi.model import cache as caches
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.offload.stats import Counts

PROMPT = 64  # tokens


@dataclass
class Run:
    """What one model did."""

    logits: list[np.ndarray]  # of the prompt's last token and of every forced token
    times: list[float]  # seconds a token, by repeat
    counts: list[Counts | None]  # of each repeat
    resident: int  # bytes


def loaded(folder: Path, slots: int | None) -> KimiLinear:
    """With so many slots a layer, whatever their size; None: without a budget."""
    if slots is None:
        return load_model(folder)
    with patch.object(import_module("mlx_kimi.loading.load"), "slots_for", lambda *_: slots):
        return load_model(folder, budget=Budget(1, context=4096))


def run(model: KimiLinear, prompt: mx.array, forced: Sequence[int], repeats: int) -> Run:
    cache = model.make_cache()
    last = model.logits(model.hidden(prompt, cache)[:, -1:])
    mx.eval(last, caches.arrays(cache))
    found = Run([np.array(last.astype(mx.float32))], [], [], mx.get_active_memory())
    for repeat in range(repeats):
        entries = [entry.snapshot() for entry in cache]
        before = replace(model.offload.counts) if model.offload else None
        mx.synchronize()
        start, ended = time.perf_counter(), None
        for token in forced:
            logits = model(mx.array([[token]]), entries)
            mx.async_eval(logits, caches.arrays(entries))
            if ended is not None:
                mx.eval(ended)  # one ahead, as in an answer
            ended = logits
            if repeat == 0:
                found.logits.append(np.array(logits.astype(mx.float32)))
        mx.eval(ended)
        found.times.append((time.perf_counter() - start) / len(forced))
        found.counts.append(model.offload.counts - before if model.offload else None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slots", type=int, nargs="*", default=[])
    options = parser.parse_args()
    config = ModelConfig.read(options.folder)
    experts, k = config.num_experts, config.num_experts_per_token
    enlarge_command_buffers()  # before the GPU is asked its name
    print(f"mlx {mx.__version__} on {mx.device_info().get('device_name', mx.default_device())}")
    print(f"{PROMPT} tokens read, {options.tokens} generated, {options.repeats} repeats")
    rng = np.random.default_rng(0)
    prompt = mx.array(rng.integers(0, config.vocab_size, (1, PROMPT)))
    forced = rng.integers(0, config.vocab_size, options.tokens).tolist()
    expected: list[np.ndarray] = []
    differ = 0
    slots = options.slots or sorted({k, experts // 4, experts // 2, experts - 1}, reverse=True)
    for number in (None, experts, *slots):
        model = loaded(options.folder, number)
        found = run(model, prompt, forced, options.repeats)
        del model
        mx.clear_cache()
        later = statistics.median(found.times[1:])
        name = "no budget" if number is None else f"{number} slots"
        line = f"{name:<10} {found.resident / 1e9:6.2f} GB"
        if found.counts[0] and found.counts[-1]:
            first, last = found.counts[0], found.counts[-1]
            line += (
                f", first {1 / found.times[0]:6.1f} tok/s, {first.hit_rate:6.1%} in memory, "
                f"{first.bytes_read / len(forced) / 1e6:6.1f} MB a token; "
                f"later {1 / later:6.1f} tok/s, {last.hit_rate:6.1%}"
            )
        else:
            line += f", {1 / later:6.1f} tok/s"
        if number is None:
            whole = found.logits
        else:
            expected = expected or found.logits
            pairs = list(zip(found.logits, expected, strict=True))
            same = all(np.array_equal(a, b) for a, b in pairs)
            differ += not same
            against = max(
                np.abs(a - b).max() / np.abs(b).max()
                for a, b in zip(found.logits, whole, strict=True)
            )
            line += f"; {'same bits' if same else 'OTHER BITS'}, {against:.1e} from no budget"
        print(line, flush=True)
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
