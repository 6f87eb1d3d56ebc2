"""The 48B's shape with random 4-bit weights on the GPU at hand, ours and mlx-lm in turns.

    .venv/bin/python -m benchmarks.speed                     # all of it
    .venv/bin/python -m benchmarks.speed decode context      # some of it

mlx-lm runs with its own Metal kernel for the delta rule: on NVIDIA GPUs through our dialect, since
it loops in Python there otherwise; that figure stands beside it. A figure is the median of repeats,
the programs taken in turns. Tokens are greedy, and a step is submitted before the last one is
awaited, as both programs do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from benchmarks.full_size import CONFIG, peer_kernels, peer_model
from benchmarks.launches import launches
from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.evaluation.random_model import model_of, random_arrays
from mlx_kimi.loading.command_buffers import enlarge_command_buffers
from mlx_kimi.metal_kernels.kda import kda
from mlx_kimi.model.cache import CacheEntry, LatentCache, arrays
from mlx_kimi.model.forward_batch import ForwardBatch
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.steps import Step

GB = 1e9
PREFILL_STEP = 2048
Run = Callable[[], float]  # seconds
TRIAL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "moe_intermediate_size": 64,
    "linear_attn_config": CONFIG["linear_attn_config"]
    | {"kda_layers": [1, 3], "full_attn_layers": [2], "num_heads": 2},
}


def main() -> None:
    parts = {f.__name__: f for f in (decode, context, memory, prefill, delta_rule)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=parts, default=[])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trial", action="store_true", help="of this script: a tiny model")
    options = parser.parse_args()
    chosen = options.parts or list(parts)
    enlarge_command_buffers()  # as `load_model` does, but for mlx-lm, too
    print(f"mlx {mx.__version__} on {mx.device_info().get('device_name', mx.default_device())}")
    config = CONFIG | TRIAL if options.trial else CONFIG
    models = _models(config) if {*chosen} - {"delta_rule"} else None
    for name in chosen:
        start = time.perf_counter()
        parts[name](config, models, options.repeats)
        print(f"  ({name}: {time.perf_counter() - start:.0f} s)\n", flush=True)


def _models(config: dict[str, Any]) -> tuple[KimiLinear, Any]:
    dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16
    weights = random_arrays(ModelConfig.from_json(config), dtype)
    with peer_kernels():
        return model_of(config, weights), peer_model(config, weights)


# ------------------------------------------------------------------------------------ decode
def decode(config: dict[str, Any], models: Any, repeats: int, tokens: int = 64) -> None:
    """Tokens a second after a prompt of 512."""
    ours, theirs = models
    prompt = mx.random.randint(0, config["vocab_size"], (1, 512), key=mx.random.key(1))
    _assert_finite(ours, prompt)
    our_cache, our_token = _read(ours, prompt)
    with peer_kernels():
        their_cache = theirs.make_cache()
        their_token = mx.argmax(theirs(prompt, their_cache)[:, -1:], axis=-1)
        mx.eval(their_token, [entry.state for entry in their_cache])
    hosts: list[float] = []
    runs: dict[str, Run] = {
        "ours": lambda: decode_ours(ours, our_cache, our_token, tokens, hosts),
        "mlx-lm": lambda: decode_theirs(theirs, their_cache, their_token, tokens, peer_kernels()),
    }
    if mx.cuda.is_available():
        runs["mlx-lm unpatched"] = lambda: decode_theirs(
            theirs, their_cache, their_token, tokens, nullcontext()
        )
    found = in_turns(runs, repeats)
    base = found["mlx-lm"]
    print(f"decode after 512 tokens, {tokens} tokens a repeat")
    for name, seconds in found.items():
        each = seconds / tokens
        print(
            f"  {name:<18} {1 / each:7.1f} tok/s   {each * 1e3:7.3f} ms   {base / seconds:5.2f} x"
        )
    host = statistics.median(hosts) / tokens
    bound = "the host's work" if host > 0.9 * found["ours"] / tokens else "the device"
    print(f"  ours: {host * 1e3:.3f} ms of a token are host time to submit it; {bound} bounds it")
    step = launches_of_a_step(ours, our_cache, our_token)
    with peer_kernels():
        results = [mx.argmax(theirs(their_token, their_cache), axis=-1)]
        kept = tree_flatten([entry.state for entry in their_cache])
        their_step = launches(*results, *(a for _, a in kept if isinstance(a, mx.array)))
    print(f"  launches a token, from the graph: ours {step}, mlx-lm {sum(their_step.values())}")


def launches_of_a_step(
    model: KimiLinear, cache: list[CacheEntry], ids: mx.array, steps: list[Step] | None = None
) -> int:
    """Of ids [B, T] and the choice of a token; `steps`: with what going back needs."""
    entries = [entry.snapshot() for entry in cache]
    logits = model.logits(model.run(ids, entries, ForwardBatch(steps=steps)))
    token = mx.argmax(logits, axis=-1)
    return sum(launches(token, *arrays(entries)).values())


def _assert_finite(model: KimiLinear, ids: mx.array) -> None:
    """Figures of a model that gives no numbers would be of nothing."""
    assert model.first_not_finite(ids) is None


def _read(model: KimiLinear, ids: mx.array) -> tuple[list[CacheEntry], mx.array]:
    cache = model.make_cache()
    logits = model.logits(model.hidden(ids, cache)[:, -1:])
    token = mx.argmax(logits, axis=-1)
    mx.eval(token, arrays(cache))
    return cache, token


def decode_ours(
    model: KimiLinear, cache: list[CacheEntry], token: mx.array, tokens: int, hosts: list[float]
) -> float:
    """Seconds of so many tokens of each row after token [B, 1]; adds the host's to `hosts`."""
    host, start = 0.0, time.perf_counter()
    for _ in range(tokens):
        before = time.thread_time()
        following = mx.argmax(model(token, cache), axis=-1)
        mx.async_eval(following, *arrays(cache))
        host += time.thread_time() - before
        mx.eval(token)
        token = following
    mx.eval(token)
    hosts.append(host)
    return time.perf_counter() - start


def decode_theirs(
    model: Any, cache: list[Any], token: mx.array, tokens: int, kernels: Any
) -> float:
    """The same by mlx-lm, within `kernels`."""
    with kernels:
        start = time.perf_counter()
        for _ in range(tokens):
            following = mx.argmax(model(token, cache), axis=-1)
            mx.async_eval(following)
            mx.eval(token)
            token = following
        mx.eval(token)
        return time.perf_counter() - start


# ----------------------------------------------------------------------------------- context
def context(config: dict[str, Any], models: Any, repeats: int, tokens: int = 16) -> None:
    """Seconds a token against what it must read, by context length; latents are random."""
    ours, theirs = models
    weights = _read_by_a_token(ours)
    state = sum(
        ours.config.kda_num_heads * ours.config.kda_head_dim**2 * 4 * 2
        for layer in ours.config.layers
        if layer.attention == "kda"
    )
    print("time per token by context")
    first_token = mx.array([[1]])
    first: tuple[float, float] | None = None
    for length in (1 << 10, 1 << 13, 1 << 15, 1 << 17, 1 << 19):
        for bits in (None, 8):
            cache = _filled(ours, length, bits)
            held = sum(e.nbytes for c in cache if isinstance(c, LatentCache) for e in c.arrays())
            runs: dict[str, Run] = {
                "ours": lambda c=cache: decode_ours(ours, c, first_token, tokens, [])
            }
            if bits is None and length <= 1 << 17:
                their_cache = _filled_peer(theirs, config, length)
                runs["mlx-lm"] = lambda c=their_cache: decode_theirs(
                    theirs, c, first_token, tokens, peer_kernels()
                )
            found = in_turns(runs, repeats)
            seconds, size = found["ours"] / tokens, weights + state + held
            first = first or (seconds, size)
            grown, must = seconds / first[0], size / first[1]
            beside = f"   mlx-lm {found['mlx-lm'] / tokens * 1e3:8.3f} ms" if len(found) > 1 else ""
            print(
                f"  {length:>7} tokens, {bits or 16:>2} bits: {seconds * 1e3:7.3f} ms, "
                f"{size / GB:6.3f} GB; time x {grown:5.2f}, bytes x {must:5.2f}, "
                f"{grown / must:4.2f} of it{beside}",
                flush=True,
            )
            del runs, cache
            mx.clear_cache()


def _read_by_a_token(model: KimiLinear) -> int:
    """Bytes of weights: all but the experts that are not chosen and the embedding's other rows."""
    config, total = model.config, 0
    for name, array in tree_flatten(model.parameters()):
        if "embed_tokens" in name:
            continue
        share = config.num_experts_per_token / config.num_experts if "switch_mlp" in name else 1
        total += int(array.nbytes * share)
    return total


def _filled(model: KimiLinear, length: int, bits: int | None = None) -> list[CacheEntry]:
    """A cache that has read `length` tokens: one real one, and random latents as if the rest."""
    cache = model.make_cache(bits)
    model(mx.array([[1]]), cache)
    for number, entry in enumerate(cache):
        if isinstance(entry, LatentCache):
            left, key = length - 1, mx.random.key(number)
            while left:
                n, (key, now) = min(left, PREFILL_STEP), mx.random.split(key)
                shape = (1, n, model.config.latent_width)
                entry.append(mx.random.normal(shape, model.norm.weight.dtype, key=now))
                left -= n
                mx.eval(entry.arrays())
        entry.lengths = (length,)
    mx.eval(arrays(cache))
    mx.clear_cache()
    return cache


def _filled_peer(model: Any, config: dict[str, Any], length: int) -> list[Any]:
    cache = model.make_cache()
    with peer_kernels():
        mx.eval(model(mx.array([[1]]), cache))
    lora, shared = config["kv_lora_rank"], config["qk_rope_head_dim"]
    for entry in cache:
        if hasattr(entry, "update_and_fetch"):
            n = length - entry.offset
            latents, keys = (
                mx.random.normal((1, 1, n, w), entry.keys.dtype) for w in (lora, shared)
            )
            entry.update_and_fetch(latents, keys)
        mx.eval(entry.state)
    return cache


# ------------------------------------------------------------------------------------ memory
def memory(config: dict[str, Any], models: Any, repeats: int, length: int = 1 << 17) -> None:
    """The peak above the weights of the last prefill step of a long context, and of decode."""
    ours, _ = models
    for bits in (None, 8):
        before = mx.get_active_memory()
        cache = _filled(ours, length - PREFILL_STEP, bits)
        mx.reset_peak_memory()
        ids = mx.random.randint(0, config["vocab_size"], (1, PREFILL_STEP))
        start = time.perf_counter()
        token = mx.argmax(ours.logits(ours.hidden(ids, cache)[:, -1:]), axis=-1)
        mx.eval(token, arrays(cache))
        seconds = time.perf_counter() - start
        prefill_peak = mx.get_peak_memory() - before
        mx.reset_peak_memory()
        decode_ours(ours, cache, token, 16, [])
        decode_peak = mx.get_peak_memory() - before
        print(
            f"memory above weights at {length} tokens, {bits or 16} bits: the last prefill step "
            f"{prefill_peak / GB:.2f} GB ({seconds:.2f} s), decode {decode_peak / GB:.2f} GB"
        )
        del cache
        mx.clear_cache()


# ----------------------------------------------------------------------------------- prefill
def prefill(config: dict[str, Any], models: Any, repeats: int, T: int = 2048) -> None:
    """A prompt of T tokens: all layers dense, and the whole model."""
    dense = config | {"first_k_dense_replace": config["num_hidden_layers"]}
    for name, pair in (("every MLP dense", _models(dense)), ("the whole model", models)):
        ours, theirs = pair
        ids = mx.random.randint(0, config["vocab_size"], (1, T), key=mx.random.key(2))
        _assert_finite(ours, ids)
        found = in_turns(
            {
                "ours": lambda m=ours, x=ids: _timed(lambda: _read(m, x)),
                "mlx-lm": lambda m=theirs, x=ids: _timed(lambda: _read_peer(m, x)),
            },
            repeats,
        )
        for who, seconds in found.items():
            print(
                f"prefill of {T}, {name}: {who:<7} {seconds * 1e3:8.1f} ms, "
                f"{T / seconds:8.0f} tok/s   {found['mlx-lm'] / seconds:5.2f} x",
                flush=True,
            )
        del pair, ours, theirs


def _read_peer(model: Any, ids: mx.array) -> None:
    """As mlx-lm does: all tokens but the last, then the last."""
    with peer_kernels():
        cache = model.make_cache()
        model(ids[:, :-1], cache)
        mx.eval([entry.state for entry in cache])
        mx.eval(model(ids[:, -1:], cache))


# --------------------------------------------------------------------------------- delta rule
def delta_rule(config: dict[str, Any], models: Any, repeats: int) -> None:
    """The delta rule's time against T: linear."""
    H, D = 32, 128
    found = {}
    for T in (1 << 12, 1 << 15):
        q, k, v = (mx.random.normal((1, T, H, D)) for _ in range(3))
        q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        q, k, v = (x.astype(mx.bfloat16) for x in (q, k, v))
        alpha, beta = mx.random.uniform(0.9, 1, (1, T, H, D)), mx.random.uniform(shape=(1, T, H))
        given = (q, k, v, alpha, beta, mx.zeros((1, H, D, D)))
        mx.eval(given)
        run = {"kda": lambda g=given: _timed(lambda: mx.eval(kda(*g)))}
        found[T] = in_turns(run, 2 * repeats)["kda"]
    short, long = found.values()
    print(
        f"delta rule: {short * 1e3:.2f} ms for 4,096 tokens, {long * 1e3:.2f} ms for 32,768: "
        f"{long / short:.2f} x, {long / short / 8:.2f} of linear"
    )


# -------------------------------------------------------------------------------------- timing
def in_turns(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Median seconds of each, the runs taken in turns so that all meet the same machine."""
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(run())
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
