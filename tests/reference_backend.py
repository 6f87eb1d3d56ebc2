"""A backend that computes each kernel of a model's decode step in its form of MLX operations.

Its launches can be traced, so that graphs which hold kernels are tested where no GPU is.
"""

from typing import Any

import mlx.core as mx

from mlx_kimi.metal_kernels import experts, sorted_experts
from mlx_kimi.metal_kernels.add_norm import naive_add_norm
from mlx_kimi.metal_kernels.kda_decode import DecodeWeights, naive_kda_decode
from mlx_kimi.metal_kernels.kda_prepare import Projected, naive_kda_finish, naive_kda_prepare
from mlx_kimi.metal_kernels.kda_sequential import naive_kda
from mlx_kimi.metal_kernels.kernel import Kernel, Launch
from mlx_kimi.metal_kernels.matrix import Matrix
from mlx_kimi.metal_kernels.mla_decode import (
    LatentWeights,
    naive_mla_attend,
    naive_mla_output,
    naive_mla_query,
)
from mlx_kimi.metal_kernels.mla_prefill import Expanded, naive_mla_prefill
from mlx_kimi.metal_kernels.split_kv import SEGMENTS, SplitKVPlan


def reference_backend(kernel: Kernel) -> Launch:
    compute = REFERENCES[kernel.name]

    def launch(*, inputs: Any, template: Any, output_shapes: Any, **rest: Any) -> list[mx.array]:
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        given = dict(zip(kernel.inputs, arrays, strict=True))
        outputs = compute(given, dict(template) | {"shapes": output_shapes})
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
    f_b, g_b = (
        _matrix(x, f"{c}_b", n[f"{c.upper()}Bits"], n[f"{c.upper()}Group"], c) for c in "fg"
    )
    gate = (x["A_log"], x["dt_bias"], x["norm"], x["eps"].item())
    return naive_kda_decode(
        x["x"], DecodeWeights(x["taps"], f_b, g_b, *gate), x["tail"], x["state"]
    )


def _kda_prepare(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    lengths = x["lengths"] if n["Padded"] else None
    before = (x["x"], x["f"], x["taps"], x["tail"])
    return naive_kda_prepare(Projected(*before, lengths, x["A_log"], x["dt_bias"]))


def _kda_sequential(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    return naive_kda(*(x[name] for name in ("q", "k", "v", "alpha", "beta", "state")))


def _kda_finish(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    return (naive_kda_finish(x["o"], x["g"], x["norm"], x["eps"].item()),)


def _mla_query(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    embed = _matrix(x, "embed", n["Bits"], n["Group"])
    weights = LatentWeights(embed, embed, x["norm"], x["eps"].item(), x["scale"].item())
    return naive_mla_query(
        x["x"], weights, x["tail"], SplitKVPlan(x["texts"], (), (), len(x["tail"]))
    )


def _mla_attend(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    plan = SplitKVPlan(x["splits"], (x["splits"],), (n["shapes"][0][0],), len(x["tail"]))
    first, *others = (x[f"segment{i + 1}"] for i in range(SEGMENTS))
    segments = [first, *(s for s in others if s is not first)]  # (which stands for absent ones)
    return naive_mla_attend(x["queries"], x["tail"], plan, segments, n["Lora"])


def _mla_output(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    unembed = _matrix(x, "unembed", n["Bits"], n["Group"])
    weights = LatentWeights(unembed, unembed, x["acc"], 0, 0)
    count = n["shapes"][0][0] // x["acc"].shape[1]
    plan = SplitKVPlan(x["texts"], (x["texts"],), (len(x["acc"]),), count)
    return (naive_mla_output(x["acc"], x["m_and_l"], plan, weights, n["OutT"]),)


def _mla_prefill(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    arrays = (x["x"], x["keys"], x["latents"], x["values"])
    given = Expanded(*arrays, x["scale"].item(), int(x["offset"].item()))
    return naive_mla_prefill(given, x["x"].dtype)


def _add_norm_scores(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    gate = _matrix(x, "gate", n["Bits"], n["Group"])
    return experts.naive_add_norm_scores(x["x"], x["part"], x["weight"], x["eps"].item(), gate)


def _expert_select(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    rule = (n["TopK"], n["Groups"], n["BestGroups"], n["Renormalize"])
    chosen: tuple[mx.array, mx.array] = experts.naive_expert_select(
        x["logits"], x["bias"], *rule, x["scale"].item()
    )
    return chosen


def _swiglu(
    x: Inputs, n: Sizes, **names: str
) -> tuple[experts.SwiGLUWeights, experts.SwiGLUWeights | None]:
    """The routed and the shared experts, of which a kernel has the matrices `names`.

    `names`: of each matrix, what its template values begin with.
    """

    def weights(prefix: str, shared: str) -> experts.SwiGLUWeights:
        found = {
            name: _matrix(x, f"{prefix}{name}", n[f"{shared}{key}Bits"], n[f"{shared}{key}Group"])
            for name, key in names.items()
        }
        any_of_them = next(iter(found.values()))
        return experts.SwiGLUWeights(*(found.get(m, any_of_them) for m in ("gate", "up", "down")))

    return weights("", ""), weights("shared_", "Shared") if n["SharedN"] else None


def _expert_gate_up(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    routed, shared = _swiglu(x, n, gate="Gate", up="Up")
    return (experts.naive_expert_gate_up(x["x"], x["experts"], routed, shared),)


def _expert_down(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    routed, shared = _swiglu(x, n, down="")
    return (experts.naive_expert_down(x["h"], x["experts"], x["weights"], routed, shared),)


def _expert_combine(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    shared = x["shared"] if n["Shared"] else None
    return (experts.naive_expert_combine(x["y"], x["places"], x["weights"], shared),)


def _expert_order(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    return sorted_experts.naive_expert_order(x["experts"], n["E"])


def _sorted_gate_up(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    routed, shared = _swiglu(x, _shared_alike(n), gate="Gate", up="Up")
    given = (x["x"], x["order"], x["starts"], n["TopK"])
    return (sorted_experts.naive_sorted_gate_up(*given, routed, shared),)


def _sorted_down(x: Inputs, n: Sizes) -> tuple[mx.array, ...]:
    routed, shared = _swiglu(x, _shared_alike(n), down="")
    given = (x["h"], x["starts"], int(x["T"].item()))
    return (sorted_experts.naive_sorted_down(*given, routed, shared),)


def _shared_alike(n: Sizes) -> Sizes:
    """The template values of the shared expert, who is stored as the routed ones are."""
    alike = {f"Shared{key}": n[key] for key in n if key.endswith(("Bits", "Group"))}
    return n | alike | {"SharedN": n["Shared"] and n["N"]}


REFERENCES = {
    "add_norm": _add_norm,
    "kda_decode": _kda_decode,
    "kda_prepare": _kda_prepare,
    "kda_sequential": _kda_sequential,
    "kda_finish": _kda_finish,
    "mla_query": _mla_query,
    "mla_attend": _mla_attend,
    "mla_output": _mla_output,
    "mla_prefill": _mla_prefill,
    "add_norm_scores": _add_norm_scores,
    "expert_select": _expert_select,
    "expert_gate_up": _expert_gate_up,
    "expert_down": _expert_down,
    "expert_combine": _expert_combine,
    "expert_order": _expert_order,
    "expert_tiles_gate_up": _sorted_gate_up,
    "expert_tiles_down": _sorted_down,
    "expert_vectors_gate_up": _sorted_gate_up,
    "expert_vectors_down": _sorted_down,
}
