"""What only the GPU at hand can say of the kernels: whether each runs, how fast, and what helps.

docs/first-mac.md says what each line decides.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.evaluation.random_model import PUBLISHED_48B, model_of, random_arrays
from mlx_kimi.loading.warm_up import warm_up
from mlx_kimi.metal_kernels.experts import (
    SwiGLUWeights,
    expert_combine,
    expert_down,
    expert_gate_up,
    expert_select,
)
from mlx_kimi.metal_kernels.kernel import Backend, Kernel, Launch, backend, use_backend
from mlx_kimi.metal_kernels.latents import pack
from mlx_kimi.metal_kernels.matrix import Matrix
from mlx_kimi.metal_kernels.mla_decode import mla_attend
from mlx_kimi.metal_kernels.sorted_experts import sorted_experts, unsupported_reason
from mlx_kimi.metal_kernels.split_kv import SplitKVPlan, positions_of_a_split
from mlx_kimi.metal_kernels.tuning import AttendShape, ExpertForm, tuning
from mlx_kimi.model.cache import TAIL
from mlx_kimi.model.forward_batch import ForwardBatch
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.moe import Experts, MixtureOfExperts

# Of the 48B an MLA layer with a dense MLP, and a KDA layer with all experts: 1 GB in 4 bits.
SAMPLE: dict[str, Any] = PUBLISHED_48B | {
    "num_hidden_layers": 2,
    "vocab_size": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "linear_attn_config": PUBLISHED_48B["linear_attn_config"]
    | {"kda_layers": [2], "full_attn_layers": [1]},
    "quantization": {"group_size": 64, "bits": 4},
}
PROMPT, CONTEXT = 2048, 32_768  # tokens
MANY = (16, 32, 64, 128, 512, 2048)
FORMS = (ExpertForm(0, "vectors"), *(ExpertForm(0, "tiles", tiles) for tiles in (1, 2, 4)))
# Heads and channels of 256 threads, of 256, of 256 with longer blocks, of 512.
SHAPES = tuple(AttendShape(*x) for x in ((16, 64, 8), (8, 64, 8), (8, 64, 16), (32, 32, 8)))
SPLITS = (24, 60, 120, 160)
REPEATS, LAUNCHES = 5, 8  # the median of so many times; launches queued at a time


def kernel_report() -> Iterator[str]:
    """Lines of text. Takes about 2 GB of memory, and on a GPU some seconds."""
    build = backend()
    if build is None:
        yield "no kernels run here"
        return
    model = model_of(SAMPLE, random_arrays(ModelConfig.from_json(SAMPLE)))
    timer = LaunchTimer(build)
    yield "compiled and run, each alone, at the 48B's sizes in 4 bits:"
    yield from _warmed_up(model, timer)
    for tokens in (1, PROMPT):
        yield f"microseconds a launch, {tokens} token{'s' * (tokens > 1)}:"
        yield from _launched(model, timer, tokens)
    yield "experts of one token, each from memory:"
    yield from _experts(model)
    yield "experts of many tokens, milliseconds of a layer:"
    yield from _many_experts(model)
    yield "logits that are not numbers:"
    yield from _not_numbers()
    yield f"one token's attention to {CONTEXT} latents, microseconds:"
    yield from _attention()


@dataclass
class LaunchTimer:
    """A backend that runs launches on another, waits for each, and times the first of a text."""

    build: Backend
    first: dict[str, float] = field(default_factory=dict)  # seconds of first launches: to compile
    texts: set[tuple[Any, ...]] = field(default_factory=set)  # a kernel's name, and what else
    latest: dict[str, Callable[[], list[mx.array]]] = field(default_factory=dict)  # launches

    def __call__(self, kernel: Kernel) -> Launch:
        run = self.build(kernel)

        def launch(**how: Any) -> list[mx.array]:
            mx.eval([x for x in how["inputs"] if isinstance(x, mx.array)])
            start = time.perf_counter()
            outputs = run(**how)
            mx.eval(outputs)
            text = (kernel.name, *how["template"], *how["output_dtypes"])
            if text not in self.texts:
                self.texts.add(text)
                seconds = time.perf_counter() - start
                self.first[kernel.name] = self.first.get(kernel.name, 0) + seconds
            self.latest[kernel.name] = lambda: run(**how)
            return outputs

        return launch


def _microseconds(launches: Sequence[Callable[[], list[mx.array]]]) -> float:
    """Of one of these launches, which are queued together: the median of REPEATS, after one."""
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        mx.eval([launch() for launch in launches])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]) / len(launches) * 1e6


def _warmed_up(model: KimiLinear, timer: LaunchTimer) -> Iterator[str]:
    with use_backend(timer, traced=True):
        refused = warm_up(model)
    pipelines = Counter(text[0] for text in timer.texts)
    for name in sorted({*pipelines, *refused}):
        if name in refused:
            yield f"  {name}: REFUSED: {refused[name]}"
        else:
            yield f"  {name}: {pipelines[name]} pipelines, {timer.first[name]:.2f} s"
    yield f"  all: {sum(timer.first.values()):.1f} s"


def _launched(model: KimiLinear, timer: LaunchTimer, tokens: int) -> Iterator[str]:
    timer.latest.clear()
    width, dtype = model.config.hidden_size, model.norm.weight.dtype
    x, residual = (mx.random.normal((1, tokens, width)).astype(dtype) for _ in range(2))
    with use_backend(timer):
        for layer, entry in zip(model.layers, model.make_cache(), strict=True):
            mx.eval(layer(x, residual, entry, ForwardBatch()), entry.arrays())
    for name, launch in sorted(timer.latest.items()):
        yield f"  {name}: {_microseconds([launch] * LAUNCHES):.1f}"


def _experts(model: KimiLinear) -> Iterator[str]:
    """Each launch takes other experts, so that none is in a cache from the one before."""
    mlp = next(layer.mlp for layer in model.layers if isinstance(layer.mlp, MixtureOfExperts))
    if why := mlp.kernels.unsupported_reason(1):
        yield f"  {why}"
        return
    routed, shared, k = mlp.kernels.routed, mlp.kernels.shared, mlp.router.top_k
    assert shared is not None
    x = mx.random.normal((1, model.config.hidden_size)).astype(model.norm.weight.dtype)
    chosen = [mx.arange(i * k, (i + 1) * k)[None].astype(mx.int32) for i in range(4 * LAUNCHES)]
    weights = mx.ones((1, k))
    h = expert_gate_up(x, chosen[0], routed, shared)
    mx.eval(h, chosen, weights)

    def gate_up(experts: mx.array) -> Callable[[], list[mx.array]]:
        return lambda: [expert_gate_up(x, experts, routed, shared)]

    def down(experts: mx.array) -> Callable[[], list[mx.array]]:
        return lambda: [expert_down(h, experts, weights, routed, shared)]

    both = [routed.gate, routed.up], [shared.gate, shared.up]
    for name, run, stacks, singles in (
        ("expert_gate_up", gate_up, *both),
        ("expert_down", down, [routed.down], [shared.down]),
    ):
        taken = _microseconds([run(experts) for experts in chosen])
        size = sum(_bytes(m) / m.weight.shape[0] * k for m in stacks) + sum(map(_bytes, singles))
        speed = f"{size / taken / 1e3:.0f} GB/s"
        yield f"  {name}: {taken:.1f} microseconds for {size / 1e6:.1f} MB: {speed}"


def _many_experts(model: KimiLinear) -> Iterator[str]:
    """In each form that `tuning` could choose, and in MLX operations."""
    mlp = next(layer.mlp for layer in model.layers if isinstance(layer.mlp, MixtureOfExperts))
    many, k = mlp.many_tokens, mlp.router.top_k
    if why := unsupported_reason(many.routed):
        yield f"  {why}"
        return
    for tokens in MANY:
        x = mx.random.normal((tokens, model.config.hidden_size)).astype(model.norm.weight.dtype)
        scores = mx.random.uniform(shape=(tokens, many.E))
        experts = mx.argsort(scores, axis=-1)[:, :k].astype(mx.int32)
        weights = mx.ones((tokens, k))
        mx.eval(x, experts, weights)
        given = (x, experts, weights)
        runs: list[tuple[ExpertForm, Callable[[], list[mx.array]]]] = [
            (form, partial(_in_form, *given, many.routed, form)) for form in FORMS
        ]
        runs.append((ExpertForm(0, "MLX"), partial(_in_ops, *given, mlp.switch_mlp)))
        here, found = many.form(tokens, k), []
        for form, run in runs:
            mark = ", as here" if form[1:3] == here[1:3] else ""
            name = f"{form.kernels}{f' {form.tiles}' if form.tiles else ''}{mark}"
            try:
                found.append(f"{name}: {_microseconds([run] * 2) / 1e3:.2f}")
            except (RuntimeError, ValueError) as error:
                found.append(f"{name}: REFUSED: {' '.join(str(error).split())}")
        yield f"  {tokens} tokens: {'; '.join(found)}"


def _in_form(
    x: mx.array, experts: mx.array, weights: mx.array, routed: SwiGLUWeights, form: ExpertForm
) -> list[mx.array]:
    y, places = sorted_experts(x, experts, routed, None, form)
    return [expert_combine(y, places, weights, None)]


def _in_ops(x: mx.array, experts: mx.array, weights: mx.array, routed: Experts) -> list[mx.array]:
    return [routed(x, experts, weights, None)]


def _bytes(matrix: Matrix) -> int:
    return sum(part.nbytes for part in matrix.buffers())


def _not_numbers() -> Iterator[str]:
    E = SAMPLE["num_experts"]
    numbers = mx.random.normal((1, E))
    for name, logits in (
        ("all NaN", mx.full((1, E), mx.nan)),
        ("every other NaN", mx.where(mx.arange(E) % 2, numbers, mx.nan)),
    ):
        experts, _ = expert_select(logits, mx.zeros(E), 8, 1, 1, True, 1.0)
        within = bool(((experts >= 0) & (experts < E)).all().item())
        yield f"  {name}: experts {experts[0].tolist()}{'' if within else ': WRONG'}"


def _attention() -> Iterator[str]:
    lora = SAMPLE["kv_lora_rank"]
    width = lora + SAMPLE["qk_rope_head_dim"]
    queries = mx.random.normal((1, SAMPLE["num_attention_heads"], width))
    plain = mx.random.normal((1, CONTEXT, width)).astype(mx.bfloat16)
    tail, packed = plain[:, :TAIL], pack(plain)
    mx.eval(queries, tail, packed)

    def taken(latents: mx.array, shape: AttendShape, splits: int) -> str:
        positions = positions_of_a_split(CONTEXT, splits)
        plan = SplitKVPlan.uniform(1, TAIL, [CONTEXT], positions)
        run = lambda: list(mla_attend(queries, tail, plan, [latents], lora, shape))  # noqa: E731
        try:
            return f"{_microseconds([run] * LAUNCHES):.0f}"
        except (RuntimeError, ValueError) as error:
            return f"REFUSED: {' '.join(str(error).split())}"

    here = tuning()
    for name, latents, own in (
        ("16 bits", plain, here.attend),
        ("8 bits", packed, here.attend_packed),
    ):
        for shape in SHAPES:
            mark = ", as here" if shape == own else ""
            yield f"  {name}, {tuple(shape)}{mark}: {taken(latents, shape, here.splits)}"
        for splits in SPLITS:
            mark = ", as here" if splits == here.splits else ""
            yield f"  {name}, {splits} splits{mark}: {taken(latents, own, splits)}"
