"""One model on one GPU, and its layers over two: speeds, memory, and the same tokens.

Random 4-bit weights of the 48B's shape are made in each GPU's memory; no file is read. Start both
processes; options are rank 0's, which prints the table and writes the JSON. Two GPUs of one host,
by NCCL:

    export MLX_WORLD_SIZE=2 NCCL_HOST_IP=127.0.0.1 NCCL_PORT=12345
    MLX_RANK=1 CUDA_VISIBLE_DEVICES=1 python -m benchmarks.ranks &
    MLX_RANK=0 CUDA_VISIBLE_DEVICES=0 python -m benchmarks.ranks --json ranks.json; wait

A trial of this script on a CPU, with a tiny model, over a ring of two local processes:

    echo '[["127.0.0.1:40100"], ["127.0.0.1:40101"]]' > hosts.json; export MLX_HOSTFILE=hosts.json
    MLX_RANK=1 python -m benchmarks.ranks &
    MLX_RANK=0 python -m benchmarks.ranks --trial; wait

The loops are the program's own: `prefill` in steps and greedy `decode`. Times are medians over
repeats. While rank 0 measures all layers on its own GPU, rank 1 waits with its part of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.full_size import CONFIG
from benchmarks.speed import TRIAL
from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.evaluation.random_model import model_of, random_arrays
from mlx_kimi.generation.decode import decode, prefill
from mlx_kimi.generation.sample import Sampler, Sampling
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.loading.command_buffers import enlarge_command_buffers
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.ranks.control import Control
from mlx_kimi.ranks.follow import Follower
from mlx_kimi.ranks.hops import Hops
from mlx_kimi.ranks.launched import Launched
from mlx_kimi.ranks.model import RankedModel

SHORT = 512  # tokens of context that decode is measured after, beside the long prompt
HOPS = 100  # of one kind, to time it
Figures = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, help="tokens of the long prompt (32,768)")
    parser.add_argument("--step", type=int, help="of prefill, in tokens (2,048)")
    parser.add_argument("--tokens", type=int, help="that are decoded, a repeat (128)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, help="of rank 0, which has the last ones (half)")
    parser.add_argument("--trial", action="store_true", help="of this script: a tiny model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.prompt = options.prompt or (256 if options.trial else 32_768)
    options.step = options.step or (64 if options.trial else 2048)
    options.tokens = options.tokens or (12 if options.trial else 128)
    launched = Launched.here()
    if launched is None or launched.size != 2:
        parser.error("two ranks are measured: see the first lines of this file")
    enlarge_command_buffers()
    control = Control(launched)
    if launched.rank:
        _follow(launched, control)
    else:
        _lead(launched, control, options)


def _config(trial: bool) -> dict[str, Any]:
    return CONFIG | TRIAL if trial else CONFIG


def _model(config: dict[str, Any], part: range | None, make: Callable[..., KimiLinear]) -> Any:
    dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16
    arrays = random_arrays(ModelConfig.from_json(config), dtype, part)
    return model_of(config, arrays, part, make)


def _follow(launched: Launched, control: Control) -> None:
    control.introduce({})
    told, _ = control.receive()
    model = _model(_config(told["trial"]), range(told["layers"]), KimiLinear)
    control.send(0, {})
    control.receive()
    hops = Hops(launched)
    _hop_times(hops, model, told["step"])
    Follower(model, control, hops).run()


def _lead(launched: Launched, control: Control, options: argparse.Namespace) -> None:
    config = _config(options.trial)
    layers = len(ModelConfig.from_json(config).layers)
    others = layers - (options.layers or layers // 2)
    part = range(others, layers)
    control.first_messages(print)
    told = {"layers": others, "step": options.step, "trial": options.trial}
    control.broadcast({"do": "load", **told})
    print(f"mlx {mx.__version__} on {mx.device_info().get('device_name', mx.default_device())}")
    whole = _model(config, None, KimiLinear)
    one = _measured(whole, options) | {"memory": [_memory()]}
    del whole
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    model = _model(config, part, RankedModel)
    control.receive(1)
    control.broadcast({"do": "connect"})
    hops = Hops(launched)
    hop = _hop_times(hops, model, options.step)
    two = _measured(model.connect(control, hops), options) | {"memory": model.memory()}
    tokens = one.pop("tokens"), two.pop("tokens")
    same = tokens[0] == tokens[1]
    report = {
        "backend": launched.backend,
        "layers_of_rank_0": len(part),
        "settings": {k: str(v) for k, v in vars(options).items()},
        "one": one,
        "two": two,
        "hop_seconds": hop,
        "same_tokens": same,
        "decode_of_one": one["token_seconds"] / two["token_seconds"],
        "long_decode_of_one": one["long_token_seconds"] / two["long_token_seconds"],
        "prefill_speedup": one["prefill_seconds"] / two["prefill_seconds"],
        "memory_of_one": max(m["active"] for m in two["memory"]) / one["memory"][0]["active"],
        "tokens": tokens[0][:32],
    }
    _print(report, options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if not same:
        raise SystemExit("one GPU and two gave different tokens")


def _memory() -> dict[str, int]:
    return {"active": mx.get_active_memory(), "peak": mx.get_peak_memory()}


def _measured(model: KimiLinear, options: argparse.Namespace) -> Figures:
    """Prefill of the long prompt, decode after a short one and after the long one."""
    vocab = model.config.vocab_size
    ids: Any = mx.random.randint(0, vocab, (options.prompt,), key=mx.random.key(7)).tolist()
    short = min(SHORT, options.prompt // 2)
    # Kernels are compiled, and graphs are built, before anything is timed.
    for length in (short, options.prompt):
        _answer(model, ids[:length], options.step, 4)
    reading, long_tokens, tokens = list[float](), list[float](), list[float]()
    drawn: list[int] = []
    for _ in range(options.repeats):
        seconds, each, host, long_drawn = _answer(model, ids, options.step, options.tokens)
        reading.append(seconds)
        long_tokens.append(each)
        _, each, host, drawn = _answer(model, ids[:short], options.step, options.tokens)
        tokens.append(each)
    return {
        "prefill_seconds": statistics.median(reading),
        "token_seconds": statistics.median(tokens),
        "long_token_seconds": statistics.median(long_tokens),
        "host_seconds": host,
        "tokens": drawn + long_drawn,
    }


def _answer(
    model: KimiLinear, ids: list[int], step: int, tokens: int
) -> tuple[float, float, float, list[int]]:
    """Seconds to read `ids`, of each token after the first, the host's of these; the tokens."""
    state = TokenState(model, snapshot_every=None)
    began = time.perf_counter()
    hidden, _ = prefill(state, ids, step)
    mx.eval(hidden)
    read = time.perf_counter()
    stream = decode(state, hidden, Sampler(Sampling(), ids, model.config.vocab_size), tokens)
    drawn = [next(stream)]
    first = time.perf_counter()
    drawn += stream
    each = (time.perf_counter() - first) / (tokens - 1)
    return read - began, each, state.host_time / (tokens - 1), drawn


def _hop_times(hops: Hops, model: KimiLinear, step: int) -> dict[str, float]:
    """Seconds that a token adds, with no layer between: its number there, x and residual back; and
    of x and residual of a prefill step."""

    def array(T: int) -> mx.array:
        return mx.zeros((2, 1, T, model.config.hidden_size), model.norm.weight.dtype)

    return {
        "token": _median_time(lambda: _round_trip(hops, array(1))),
        "step": _median_time(lambda: _hop(hops, array(step))),
    }


def _round_trip(hops: Hops, x: mx.array) -> None:
    if hops.rank == 0:
        hops.send_token(mx.zeros((1, 1)))
        _hop(hops, x)
    else:
        token = hops.awaited(hops.receive_token())
        _hop(hops, x + token.astype(x.dtype))  # which it cannot send before


def _hop(hops: Hops, x: mx.array) -> None:
    if hops.rank == 0:
        mx.eval(hops.receive(x.shape, x.dtype))
    else:
        hops.send(x)
        mx.synchronize()


def _median_time(once: Callable[[], None]) -> float:
    times = []
    for _ in range(HOPS):
        began = time.perf_counter()
        once()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _print(report: Figures, options: argparse.Namespace) -> None:
    one, two = report["one"], report["two"]
    rows = (
        (f"prefill of {options.prompt:,}, tok/s", "prefill_seconds", options.prompt),
        (f"decode after {SHORT}, tok/s", "token_seconds", 1),
        ("decode after the prompt, tok/s", "long_token_seconds", 1),
    )
    print(f"{'':34}{'one':>10}{'two':>10}{'':>8}")
    for title, key, tokens in rows:
        of_one = one[key] / two[key]
        print(f"{title:34}{tokens / one[key]:>10.1f}{tokens / two[key]:>10.1f}{of_one:>7.2f}x")
    for which in ("active", "peak"):
        held = " + ".join(f"{m[which] / 1e9:.2f}" for m in two["memory"])
        print(f"{which + ' memory, GB':34}{one['memory'][0][which] / 1e9:>10.2f}{held:>18}")
    hosts = (1e3 * found["host_seconds"] for found in (one, two))
    print(f"{'host a token, ms':34}" + "".join(f"{ms:>10.2f}" for ms in hosts))
    hops = ", ".join(f"{name} {s * 1e6:.0f}" for name, s in report["hop_seconds"].items())
    print(f"a hop, us: {hops}; the same tokens: {report['same_tokens']}")


if __name__ == "__main__":
    main()
