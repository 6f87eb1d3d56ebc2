"""Prefill and decode of a small model on the CPU, ours and mlx-lm's in turns, from one folder.

    .venv/bin/python -m benchmarks.cpu

Prints the fastest of the repeats and ratios. On Linux MLX multiplies float32 matrices at about
3 to 6 GFLOP/s, which bounds both programs: the time without the delta rule stands beside the whole.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

os.environ["MLX_ENABLE_TF32"] = "0"

import mlx.core as mx
import mlx_lm
from mlx_lm.models import gated_delta as peer_delta
from mlx_lm.models import kimi_linear as peer
from mlx_lm.utils import load_model as load_peer

from mlx_kimi import load_model
from mlx_kimi.metal_kernels.kda import kda
from mlx_kimi.metal_kernels.kda_prepare import l2_normalised
from mlx_kimi.model import kda as ours_kda
from mlx_kimi.model.cache import arrays
from tests.checkpoints import published_config, write_checkpoint

TOY = published_config(
    kda_layers=[1, 2, 3, 5],
    full_attn_layers=[4],
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    kv_lora_rank=64,
    kda_num_heads=4,
    kda_head_dim=32,
    num_experts=16,
    num_experts_per_token=4,
    model_max_length=1 << 20,
)
Times = dict[str, float]


def fastest(repeats: int, runs: dict[str, Callable[[], object]]) -> Times:
    """Seconds of the fastest run of each, taken in turns so that both meet the same machine."""
    for run in runs.values():
        run()
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def delta_rule(T: int, repeats: int) -> Times:
    """One layer's delta rule, decays and write strengths given."""
    H, D = TOY["linear_attn_config"]["num_heads"], TOY["linear_attn_config"]["head_dim"]
    mx.random.seed(0)
    q, k, v = (mx.random.normal((1, T, H, D)) for _ in range(3))
    q, k = l2_normalised(q, D**-0.5), l2_normalised(k)
    alpha, beta = mx.random.uniform(shape=(1, T, H, D)), mx.random.uniform(shape=(1, T, H))
    state = mx.zeros((1, H, D, D))
    mx.eval(q, k, v, alpha, beta, state)
    rules = {"ours": kda, "mlx-lm": peer_delta.gated_delta_ops}
    runs = {
        n: lambda rule=rule: mx.eval(rule(q, k, v, alpha, beta, state)) for n, rule in rules.items()
    }
    return fastest(repeats, runs)


def model_runs(folder: Path, T: int) -> tuple[dict[str, Callable[[], object]], ...]:
    """Prefill of T tokens, and 64 steps of decode after them."""
    ours, (theirs, _) = load_model(folder), load_peer(folder)
    ids = mx.random.randint(0, TOY["vocab_size"], (1, T))

    def prefill(model: object) -> list[object]:
        # As both programs do it: the cache of all tokens and the logits of the last.
        cache = model.make_cache()  # type: ignore[attr-defined]
        if model is ours:
            mx.eval(model.logits(model.hidden(ids, cache)[:, -1]), arrays(cache))
        else:
            model(ids[:, :-1], cache)  # type: ignore[operator]
            mx.eval([entry.state for entry in cache])
            mx.eval(model(ids[:, -1:], cache))  # type: ignore[operator]
        return cache

    def decode(model: object, cache: list[object]) -> None:
        token = mx.array([[1]])
        for _ in range(64):
            token = mx.argmax(model(token, cache)[:, -1:], axis=-1)  # type: ignore[operator]
            mx.async_eval(token)
        mx.eval(token)

    caches = {"ours": prefill(ours), "mlx-lm": prefill(theirs)}
    models = {"ours": ours, "mlx-lm": theirs}
    return (
        {name: lambda m=m: prefill(m) for name, m in models.items()},
        {name: lambda n=name, m=m: decode(m, caches[n]) for name, m in models.items()},
    )


def without_delta_rule(runs: dict[str, Callable[[], object]], repeats: int) -> Times:
    """The same runs with the delta rule replaced by a copy of v."""

    def nothing(q, k, v, *rest):  # type: ignore[no-untyped-def]
        return v, rest[-1] if isinstance(rest[-1], mx.array) else rest[-2]

    def peer_nothing(q, k, v, a, b, A_log, dt_bias, state, *rest, **named):  # type: ignore[no-untyped-def]
        return v, mx.zeros((1, v.shape[2], v.shape[3], k.shape[3])) if state is None else state

    with (
        patch.object(ours_kda, "kda", nothing),
        patch.object(peer, "gated_delta_update", peer_nothing),
    ):
        return fastest(repeats, runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    T = options.tokens
    with tempfile.TemporaryDirectory() as place:
        prefill, decode = model_runs(write_checkpoint(Path(place), TOY), T)
        rows = {
            f"delta rule, one layer, T = {T}": delta_rule(T, options.repeats),
            f"prefill, T = {T}": fastest(options.repeats, prefill),
            "prefill, delta rule removed": without_delta_rule(prefill, options.repeats),
            "decode, 64 tokens": fastest(options.repeats, decode),
        }
    machine = f"{platform.machine()} {platform.system()}"
    print(f"{machine}, mlx {mx.__version__}, mlx-lm {mlx_lm.__version__}")
    for what, times in rows.items():
        ours, theirs = times["ours"] * 1e3, times["mlx-lm"] * 1e3
        print(f"{what:<32} ours {ours:8.1f} ms   mlx-lm {theirs:8.1f} ms   {theirs / ours:5.2f} x")


if __name__ == "__main__":
    main()
