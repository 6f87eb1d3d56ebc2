"""The graphs of steps of the 48B at 4 bits, at its real sizes: nothing is computed or stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from benchmarks.command_buffers import Array, Graph, Node
from benchmarks.full_size import CONFIG
from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.tensors import tensors
from mlx_kimi.metal_kernels.attention import SubmitLimit
from mlx_kimi.metal_kernels.kernel import Kernel, Launch, use_backend
from mlx_kimi.model.cache import TAIL, CacheEntry, KDACache, LatentCache, Segment
from mlx_kimi.model.forward_batch import ForwardBatch
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.random_weights import Arrays, stored_quantization, zero_tensor
from mlx_kimi.model.weights import Weights

CONFIG_48B = ModelConfig.from_json(CONFIG)
DTYPE = mx.bfloat16
PAST = TAIL + TAIL // 2  # tokens in the cache before a step: a segment of latents, half a tail
# The primitive that stands for a launch of our kernels, or of an operation that MLX takes apart on
# CPU or cannot export. Its inputs are what is made, then what is read.
STAND_IN = "Depends"


def step_graph(T: int) -> Graph:
    """Of a step of T tokens; one token is followed by the choice of the next.

    What a function of `mx.compile` does in one launch counts as its parts, which are more.
    """
    weights: Arrays = {}
    for tensor in tensors(CONFIG_48B):
        weights |= zero_tensor(tensor, DTYPE, stored_quantization(tensor, CONFIG_48B))
    counts: list[int] = []

    def step(ids: mx.array, *given: mx.array, **weights: mx.array) -> list[mx.array]:
        with _pretended_gpu() as pieces:
            model = KimiLinear(CONFIG_48B, Weights(weights, CONFIG_48B))
            pairs = zip(model.make_cache(), given[::2], given[1::2], strict=True)
            cache = [_entry(*of_layer) for of_layer in pairs]
            x = model.run(ids, cache, ForwardBatch())
            if T == 1:
                x = mx.argmax(model.logits(x), axis=-1)
        pieces.append([x, *(array for entry in cache for array in entry.arrays())])
        counts.extend(map(len, pieces))
        return [array for piece in pieces for array in piece]

    given = [mx.zeros((1, T), mx.int32), *_cached()]
    events: list[dict[str, Any]] = []
    mx.export_function(events.append, step, given, weights)
    return _graph(events, len(given), counts)


def _cached() -> Iterator[mx.array]:
    """Two arrays of each layer: the tail of its convolution and its state; a segment and a tail."""
    config = CONFIG_48B
    heads, D = config.kda_num_heads, config.kda_head_dim
    for layer in config.layers:
        if layer.attention == "kda":
            yield mx.zeros((1, config.short_conv_kernel_size - 1, 3 * heads * D), DTYPE)
            yield mx.zeros((1, heads, D, D))
        else:
            for _ in range(2):
                yield mx.zeros((1, TAIL, config.latent_width), DTYPE)


def _entry(kind: CacheEntry, first: mx.array, second: mx.array) -> CacheEntry:
    if isinstance(kind, KDACache):
        return KDACache((PAST,), first, second)
    return LatentCache((PAST,), ((Segment.whole(first),),), second, (PAST - TAIL,))


@contextmanager
def _pretended_gpu() -> Iterator[list[list[mx.array]]]:
    """Trace what a GPU is given: our kernels, and what is submitted, which is yielded."""
    pieces: list[list[mx.array]] = []

    def submit(self: SubmitLimit, *results: mx.array) -> None:
        pieces.append(list(results))

    def launched(inputs: Sequence[Any], shapes: Any, dtypes: Any) -> list[mx.array]:
        made = [mx.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        return mx.depends(made, [x for x in inputs if isinstance(x, mx.array)])

    def kernels(kernel: Kernel) -> Launch:
        def launch(*, inputs: Any, output_shapes: Any, output_dtypes: Any, **_: Any) -> Any:
            return launched(inputs, output_shapes, output_dtypes)

        return launch

    def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
        return launched([x, weight], [x.shape], [x.dtype])[0]

    def contiguous(x: mx.array) -> mx.array:  # (MLX 0.32 cannot export it)
        return launched([x], [x.shape], [x.dtype])[0]

    def dequantize(weight: mx.array, *parts: mx.array | None, bits: int, **_: Any) -> mx.array:
        shape = (*weight.shape[:-1], weight.shape[-1] * 32 // bits)
        return launched([weight, *parts], [shape], [DTYPE])[0]

    with (
        patch.object(mx, "default_device", lambda: mx.Device(mx.gpu)),
        patch.object(mx.fast, "rms_norm", rms_norm),
        patch.object(mx, "contiguous", contiguous),
        patch.object(mx, "dequantize", dequantize),
        patch.object(SubmitLimit, "submit", submit),
        use_backend(kernels),
    ):
        yield pieces


def _graph(events: list[dict[str, Any]], given: int, counts: Sequence[int]) -> Graph:
    """What an export says, as a graph. Its first `given` inputs are not weights."""
    said = {event["type"]: event for event in events if event["type"] != "primitive"}
    fresh = {name for name, *_ in said["inputs"]["inputs"][:given]}
    stored, nodes = [], []
    for event in events:
        if event["type"] != "primitive":
            continue
        node = _node(event)
        if fresh.isdisjoint(array.name for array in node.inputs):
            stored.append(node)
        else:
            nodes.append(node)
            fresh |= {array.name for array in node.outputs}
    names = iter(name for name, *_ in said["outputs"]["outputs"])
    return Graph(stored, nodes, [[next(names) for _ in range(count)] for count in counts])


def _node(event: dict[str, Any]) -> Node:
    inputs, outputs = (
        [Array(name, prod(shape), prod(shape) * dtype.size) for name, shape, dtype in event[kind]]
        for kind in ("inputs", "outputs")
    )
    if event["name"] == STAND_IN:
        return Node("kernel", inputs[len(outputs) :], outputs)
    return Node(event["name"], inputs, outputs)
