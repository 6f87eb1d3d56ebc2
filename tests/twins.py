"""A backend that computes each kernel of a model's decode step in MLX operations.

Its launches can be traced, so that graphs which hold kernels are tested where no GPU is.
"""

from typing import Any

import mlx.core as mx

from mlx_kimi.metal_kernels.add_norm import naive_add_norm
from mlx_kimi.metal_kernels.kda_decode import DecodeWeights, naive_kda_decode
from mlx_kimi.metal_kernels.kernel import Kernel, Launch
from mlx_kimi.metal_kernels.latents import is_packed, unpack
from mlx_kimi.metal_kernels.matrix import Matrix
from mlx_kimi.metal_kernels.mla_prefill import Expanded, naive_mla_prefill
from mlx_kimi.model.moe import _select


def twins(kernel: Kernel) -> Launch:
    twin = TWINS[kernel.name]

    def launch(*, inputs: Any, template: Any, output_shapes: Any, **rest: Any) -> list[mx.array]:
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        given = dict(zip(kernel.inputs, arrays, strict=True))
        outputs = twin(given, dict(template) | {"shapes": output_shapes})
        dtypes = rest["output_dtypes"]
        assert [tuple(y.shape) for y in outputs] == [tuple(shape) for shape in output_shapes]
        return [y.astype(dtype) for y, dtype in zip(outputs, dtypes, strict=True)]

    return launch


Inputs = dict[str, mx.array]
Sizes = dict[str, Any]


def _matrix(x: Inputs, name: str, bits: int, group: int, prefix: str | None = None) -> Matrix:
    prefix = name if prefix is None else prefix
    parts = [x[f"{prefix}_{part}"] if bits else None for part in ("scales", "biases")]
    return Matrix(x[name], *parts, group, bits)


def _add_norm(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    return naive_add_norm(x["x"], x["part"], x["weight"], x["eps"].item())


def _kda_decode(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    f_b, g_b = (_matrix(x, f"{c}_b", n["Bits"], n["Group"], c) for c in "fg")
    gate = (x["A_log"], x["dt_bias"], x["norm"], x["eps"].item())
    return naive_kda_decode(
        x["x"], DecodeWeights(x["taps"], f_b, g_b, *gate), x["tail"], x["state"]
    )


def _mla_query(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    H, lora, shared, room = n["H"], n["Lora"], n["Shared"], n["Room"]
    q, latent, key = mx.split(x["x"], [-lora - shared, -shared], axis=-1)
    q_nope, q_shared = mx.split(q.reshape(len(q), H, -1), [n["Nope"]], axis=-1)
    embed = _matrix(x, "embed", n["Bits"], n["Group"])
    absorbed = embed.times(q_nope[:, :, None])[:, :, 0]
    latent = mx.fast.rms_norm(latent, x["norm"], x["eps"].item())
    new = mx.concatenate([latent, key], axis=-1)[:, None]
    newest = x["plan"][2 + n["Segments"] + 1] - 1
    tail = mx.where(mx.arange(room)[:, None] == newest, new, x["tail"])
    return mx.concatenate([absorbed, q_shared], axis=-1) * x["scale"], tail


def _mla_attend(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    """All in the first split; the others are empty."""
    queries, plan, lora = x["queries"].astype(mx.float32), x["plan"], n["Lora"]
    B, H, width = queries.shape
    _, sizes = mx.split(plan[2:], 2)
    scores, values = [], []
    for i, name in enumerate(("tail", *(f"segment{i + 1}" for i in range(n["Segments"])))):
        rows = x[name]
        plain = unpack(rows, width) if is_packed(rows) else rows.astype(mx.float32)
        here = queries @ plain.swapaxes(-1, -2)
        scores.append(mx.where(mx.arange(plain.shape[1]) < sizes[i], here, -mx.inf))
        values.append(plain[..., :lora])
    joined = mx.concatenate(scores, axis=-1)
    highest = joined.max(axis=-1, keepdims=True)
    shares = mx.exp(joined - highest)
    outputs = (shares @ mx.concatenate(values, axis=1))[:, None]
    sums = mx.concatenate([highest, shares.sum(axis=-1, keepdims=True)], axis=-1)[:, None]
    empty = n["shapes"][0][1] - 1
    none = mx.broadcast_to(mx.array([-mx.inf, 0.0]), (B, empty, H, 2))
    return (
        mx.concatenate([outputs, mx.zeros((B, empty, H, lora))], axis=1),
        mx.concatenate([sums, none], axis=1),
    )


def _mla_output(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    m, total = mx.split(x["m_and_l"], 2, axis=-1)
    e = mx.exp(m - m.max(axis=1, keepdims=True))
    latent = (e * x["acc"]).sum(axis=1) / (e * total).sum(axis=1)
    unembed = _matrix(x, "unembed", n["Bits"], n["Group"])
    y = unembed.times(latent[:, :, None].astype(n["OutT"]))
    return (y.reshape(len(y), -1),)


def _mla_prefill(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    arrays = (x["x"], x["keys"], x["latents"], x["values"])
    given = Expanded(*arrays, x["scale"].item(), int(x["offset"].item()))
    return naive_mla_prefill(given, x["x"].dtype)


def _add_norm_scores(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    total, normed = _add_norm(x, n)
    gate = _matrix(x, "gate", n["Bits"], n["Group"])
    return total, normed, gate.times(normed.astype(mx.float32))


def _expert_select(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    rule = (n["TopK"], n["Groups"], n["BestGroups"], n["Renormalize"])
    experts, weights = _select(x["logits"], x["bias"], *rule, x["scale"].item())
    return experts, weights


def _of_experts(x: mx.array, matrix: Matrix, experts: mx.array) -> mx.array:
    """x [B, k, in] times each token's experts -> [B, k, out]."""
    w, scales, biases, group, bits = matrix
    if not bits:
        y = mx.gather_mm(x[:, :, None], w.swapaxes(-1, -2), rhs_indices=experts)
    else:
        y = mx.gather_qmm(
            x[:, :, None], w, scales, biases, None, experts, True, group_size=group, bits=bits
        )
    return y[:, :, 0]


def _expert_gate_up(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    def pair(prefix: str, bits: int, group: int) -> list[Matrix]:
        return [_matrix(x, f"{prefix}{name}", bits, group) for name in ("gate", "up")]

    B, K = x["x"].shape
    rows = mx.broadcast_to(x["x"][:, None], (B, n["TopK"], K))
    routed = pair("", n["Bits"], n["Group"])
    gate, up = (_of_experts(rows, m, x["experts"]).reshape(B, -1) for m in routed)
    if n["SharedN"]:
        beside = pair("shared_", n["SharedBits"], n["SharedGroup"])
        gate, up = (
            mx.concatenate([y, m.times(x["x"])], axis=-1)
            for y, m in zip((gate, up), beside, strict=True)
        )
    return (gate * mx.sigmoid(gate) * up,)


def _expert_down(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    B, routed = len(x["h"]), n["TopK"] * n["N"]
    h = x["h"][:, :routed].reshape(B, n["TopK"], -1)
    parts = _of_experts(h, _matrix(x, "down", n["Bits"], n["Group"]), x["experts"])
    y = (parts * x["weights"][..., None]).sum(axis=1)
    if n["SharedN"]:
        shared = _matrix(x, "shared_down", n["SharedBits"], n["SharedGroup"])
        y = y + shared.times(x["h"][:, routed:])
    return (y,)


def _expert_combine(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    y = (x["y"][x["places"]] * x["weights"][..., None]).sum(axis=-2).astype(x["y"].dtype)
    return (y + x["shared"] if n["Shared"] else y,)


TWINS = {
    "add_norm": _add_norm,
    "kda_decode": _kda_decode,
    "mla_query": _mla_query,
    "mla_attend": _mla_attend,
    "mla_output": _mla_output,
    "mla_prefill": _mla_prefill,
    "add_norm_scores": _add_norm_scores,
    "expert_select": _expert_select,
    "expert_gate_up": _expert_gate_up,
    "expert_down": _expert_down,
    "expert_combine": _expert_combine,
}
