"""Layers of the 48B's width in every stored format: are they right, and how fast is a prompt?

    .venv/bin/python -m benchmarks.formats check      # forced tokens, against plain products
    .venv/bin/python -m benchmarks.formats time       # 2,048 tokens, ours and mlx-lm in turns
    .venv/bin/python -m benchmarks.formats time --formats 8bit mxfp4

`time` also gives the routed experts' own speed, and its share of that of MLX's dense product of as
many rows, which is what a format could reach here. mlx-lm's experts are first compared with
float32: where they are wrong or refuse, that is said, and no ratio is given. `--no-peer` leaves
mlx-lm out: in some formats MLX takes minutes on NVIDIA GPUs.
"""

from __future__ import annotations

import os

os.environ["MLX_ENABLE_TF32"] = "0"

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from benchmarks.full_size import CONFIG, peer_kernels, peer_model
from benchmarks.speed import in_turns
from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.evaluation.random_model import model_of, random_arrays
from mlx_kimi.loading.command_buffers import enlarge_command_buffers
from mlx_kimi.metal_kernels.kernel import backend, use_backend
from mlx_kimi.metal_kernels.matmul import plain_products
from mlx_kimi.metal_kernels.sorted_experts import expert_order, sorted_down, sorted_gate_up
from mlx_kimi.model.cache import arrays
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.linear import Linear
from mlx_kimi.model.moe import Experts, MixtureOfExperts
from mlx_kimi.tuning.reference import with_experts_one_by_one
from tests.assertions import largest_error, rms_error

FORMATS: dict[str, dict[str, Any] | None] = {
    **{f"{bits}bit": {"group_size": 64, "bits": bits} for bits in (8, 6, 5, 4, 3, 2)},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "unquantized": None,
}
PROMPT, FORCED = 256, 16  # tokens of `check`
LOGITS = 1e-4  # of the largest: float32, added in another order
EXPERTS = 1e-2  # rms of mlx-lm's experts: three roundings to bfloat16, and some room


def config_of(how: dict[str, Any] | None, layers: int) -> dict[str, Any]:
    """The 48B's with this many layers, every fourth of them MLA."""
    linear = CONFIG["linear_attn_config"]
    numbers = {
        name: [n for n in linear[name] if n <= layers]
        for name in ("kda_layers", "full_attn_layers")
    }
    config = CONFIG | {"num_hidden_layers": layers, "linear_attn_config": linear | numbers}
    config.pop("quantization")
    return config | ({} if how is None else {"quantization": how})


# ------------------------------------------------------------------------------------- right?
def check(name: str, layers: int) -> bool:
    """Whether a prompt and forced tokens give what plain products give, one expert at a time."""
    config = config_of(FORMATS[name], layers)
    stored = random_arrays(ModelConfig.from_json(config), mx.float32)
    ids = mx.random.randint(0, config["vocab_size"], (1, PROMPT + FORCED), key=mx.random.key(3))
    found = {}
    for how, traced in {"compiled": True, "layer by layer": False}.items():
        with use_backend(backend(), traced):
            found[how] = _one_by_one(model_of(config, stored), ids)
    plain = model_of(config, stored)
    for layer in plain.layers:
        with_experts_one_by_one(layer)
    del stored
    with use_backend(None), plain_products():
        expected = _one_by_one(plain, ids)
    right = True
    for how, logits in found.items():
        error = largest_error(logits, expected)
        right &= error <= LOGITS
        print(f"{'ok    ' if error <= LOGITS else 'FAILED'} {name:<12} {how:<15} {error:.1e}")
    return right


def _one_by_one(model: KimiLinear, ids: mx.array) -> mx.array:
    cache = model.make_cache()
    logits = [model(ids[:, :PROMPT], cache)]
    for t in range(PROMPT, ids.shape[1]):
        logits.append(model(ids[:, t : t + 1], cache))
        mx.eval(logits[-1])
    return mx.concatenate(logits, axis=1)


# ----------------------------------------------------------------------------------- how fast?
def times(name: str, layers: int, T: int, repeats: int, with_peer: bool) -> None:
    """A prompt of T tokens in `layers` layers, and the routed experts alone."""
    config = config_of(FORMATS[name], layers)
    stored = random_arrays(ModelConfig.from_json(config), mx.bfloat16)
    ours = model_of(config, stored)
    moe = ours.layers[-1].mlp
    assert isinstance(moe, MixtureOfExperts)
    print(f"{name}: {_experts_alone(moe, T)}", flush=True)
    ids = mx.random.randint(0, config["vocab_size"], (1, T), key=mx.random.key(2))
    runs: dict[str, Callable[[], float]] = {"ours": lambda: _seconds(ours, ids)}
    try:
        if not with_peer:
            raise ValueError("left out")
        with peer_kernels():
            theirs = peer_model(config, stored)
            error = _error_of_peer(theirs.layers[-1].mlp.switch_mlp, moe.switch_mlp)
            if error > EXPERTS:
                raise ValueError(f"its experts err by {error:.1e} (rms)")
        runs["mlx-lm"] = lambda: _seconds(theirs, ids)
    except (ValueError, RuntimeError) as reason:
        print(f"  mlx-lm is not compared: {str(reason).splitlines()[0][:120]}")
    with peer_kernels():
        found = in_turns(runs, repeats)
    for who, seconds in found.items():
        ratio = f"{found['mlx-lm'] / seconds:6.2f} x" if "mlx-lm" in found else ""
        print(f"  prefill of {T}, {layers} layers: {who:<7} {seconds * 1e3:8.1f} ms {ratio}")


def _seconds(model: Any, ids: mx.array) -> float:
    cache = model.make_cache()
    start = time.perf_counter()
    logits = model(ids, cache)[:, -1]
    kept = arrays(cache) if isinstance(model, KimiLinear) else [entry.state for entry in cache]
    mx.eval(logits, kept)
    return time.perf_counter() - start


def _experts_alone(moe: MixtureOfExperts, T: int) -> str:
    """TFLOP/s of the routed experts, and the share of MLX's dense product of as many rows."""
    many, k = moe.many_tokens, moe.router.top_k
    E, N, K = moe.switch_mlp.gate_proj.weight.shape[0], *_sizes(moe.switch_mlp.gate_proj)
    x = mx.random.normal((T, K)).astype(mx.bfloat16)
    experts = mx.argsort(mx.random.uniform(shape=(T, E)), axis=-1)[:, :k].astype(mx.int32)
    order, _, starts = expert_order(experts, E)
    form = many.form(T, k)
    h = sorted_gate_up(x, order, starts, k, many.routed, None, form)
    gate = moe.switch_mlp.gate_proj
    dense = Linear(*(gate.get(part) for part in ("weight", "scales", "biases")), gate.quantization)
    for part in ("weight", "scales", "biases"):
        if dense.get(part) is not None:
            setattr(dense, part, mx.contiguous(dense[part][0]))
    rows = mx.random.normal((T * k, K)).astype(mx.bfloat16)
    mx.eval(x, order, starts, h, rows, dense.parameters())
    product = 2 * T * k * K * N  # FLOP of one of the three matrices
    seconds = _median(lambda: sorted_gate_up(x, order, starts, k, many.routed, None, form))
    seconds += _median(lambda: sorted_down(h, starts, T, many.routed, None, form))
    own = 3 * product / seconds / 1e12
    said = f"experts of {T} tokens {own:.0f} TFLOP/s"
    try:
        best = product / _median(lambda: dense.matrix.times(rows)) / 1e12
    except (ValueError, RuntimeError) as reason:
        return f"{said}; MLX has no dense product: {str(reason).splitlines()[0][:80]}"
    return f"{said}, {own / best:.2f} of MLX's dense product ({best:.0f})"


def _sizes(linear: Linear) -> tuple[int, int]:
    return linear.matrix.rows, linear.matrix.columns


def _median(run: Callable[[], mx.array], calls: int = 4) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        mx.eval([run() for _ in range(calls)])
        return (time.perf_counter() - start) / calls

    seconds()
    return statistics.median(seconds() for _ in range(5))


def _error_of_peer(theirs: Any, ours: Experts) -> float:
    """The rms error of mlx-lm's experts of a few of 64 tokens, which it sorts, against float32."""
    T, E, (_, K) = 64, ours.count, _sizes(ours.gate_proj)
    x = mx.random.normal((1, T, K)).astype(mx.bfloat16)
    experts = mx.argsort(mx.random.uniform(shape=(1, T, E)), axis=-1)[..., :8]
    y = theirs(x, experts)
    found, expected = [], []
    for token in range(0, T, T // 4):
        row = x[0, token].astype(mx.float32)
        for i, expert in enumerate(experts[0, token].tolist()):
            g, u = (
                row @ _float32(p, expert).swapaxes(-1, -2) for p in (ours.gate_proj, ours.up_proj)
            )
            found.append(y[0, token, i])
            expected.append((g * mx.sigmoid(g) * u) @ _float32(ours.down_proj, expert).T)
    return rms_error(mx.stack(found), mx.stack(expected))


def _float32(stack: Linear, expert: int) -> mx.array:
    return stack.member(expert).dequantized().astype(mx.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--layers", type=int, help="4 for check, 8 for time")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true", help="without mlx-lm")
    options = parser.parse_args()
    enlarge_command_buffers()
    print(f"mlx {mx.__version__} on {mx.device_info().get('device_name', mx.default_device())}")
    right = True
    for name in options.formats:
        if options.what == "check":
            right &= check(name, options.layers or 4)
        else:
            peer = not options.no_peer
            times(name, options.layers or 8, options.tokens, options.repeats, peer)
        mx.clear_cache()
    sys.exit(not right)


if __name__ == "__main__":
    main()
