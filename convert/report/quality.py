"""What a conversion cost: errors of weights and of layers' outputs, and of the predictions.

Both models are run layer by layer, so that neither has to fit into memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.files import Checkpoint
from mlx_kimi.checkpoint.tensors import Join, tensors
from mlx_kimi.convert.blocks import TensorReader
from mlx_kimi.convert.plan import PROCESS
from mlx_kimi.convert.report.divergence import divergence
from mlx_kimi.convert.report.layerwise import EXPERTS, Layers
from mlx_kimi.convert.report.weight_error import Squares, weight_errors
from mlx_kimi.defaults import REPORTED_TOKENS, WINDOW
from mlx_kimi.evaluation.evaluate import Evaluation, first_tokens, windows
from mlx_kimi.loading.match import check
from mlx_kimi.loading.memory import activation_bytes
from mlx_kimi.model.forward_batch import ForwardBatch
from mlx_kimi.text.tokenizer import load_tokenizer

FILE = "quality.json"
COPIES = 2  # of a layer and of a slice of its experts: as they are read, and as they are used


@dataclass(frozen=True)
class LayerQuality:
    """Errors of one decoder layer. All errors are ||found - expected|| / ||expected||."""

    number: int  # from 0 on, as in the tensors' names
    attention: str
    feed_forward: str
    weights: dict[str, float]  # by family
    # Of the residual stream after the layer:
    alone: float  # this layer as it was written, given what the unquantized layers before it give
    together: float  # this layer and all before it as they were written


@dataclass(frozen=True)
class Quality:
    """Errors of a converted model against its source, on a text."""

    tokens: int
    window: int
    outside: dict[str, float]  # errors of weights that are in no layer, by family
    layers: tuple[LayerQuality, ...]
    predictions: Evaluation

    def json(self) -> dict[str, Any]:
        """All fields, perplexities included."""
        return asdict(self) | {"predictions": self.predictions.json()}


def sample_text() -> str:
    """The text that is predicted unless another is given."""
    return (files("mlx_kimi.convert.report") / "sample.txt").read_text(encoding="utf-8")


def sample_ids(folder: Path, text: str) -> list[int]:
    """The first REPORTED_TOKENS tokens of a text.

    Raises:
        KimiError: the folder has no tokenizer, or the text is too short.
    """
    return first_tokens(load_tokenizer(folder), text, REPORTED_TOKENS)


def peak_memory(config: ModelConfig) -> int:
    """Bytes that the process takes at most while it measures, however many the experts are."""
    sizes: dict[str, int] = {}
    for tensor in tensors(config):
        if tensor.name.startswith("model.layers."):
            layer = tensor.name.split(".")[2]
            shape = tensor.shape[1:] if tensor.join is Join.STACK else tensor.shape
            sizes[layer] = sizes.get(layer, 0) + 4 * math.prod(shape)
    work = activation_bytes(config, 4, REPORTED_TOKENS, WINDOW)
    return PROCESS + COPIES * (max(sizes.values()) + EXPERTS) + work


def measure(
    source: Path,
    out: Path,
    ids: list[int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Quality:
    """Compare the folder `out` with the `source` that it was converted from.

    Args:
        ids: of `sample_ids`.
        progress: called after every layer, with how many of how many are done.

    Raises:
        KimiError: a folder is no whole model, or cannot be read.
    """
    expected, found = (Layers(_reader(folder)) for folder in (source, out))
    batch = _Batch.of(ids)
    x, y = expected.embedded(batch.ids), found.embedded(batch.ids)
    layers, count = [], len(expected.config.layers)
    for number in range(count):
        progress(number, count)
        layer, x, y = _layer(expected, found, number, x, y, batch)
        layers.append(layer)
    outside = [t for name, t in expected.tensors.items() if not name.startswith("model.layers.")]
    errors = weight_errors(expected.reader, found.reader, outside)
    x, y = (_rows(of.normed(z), batch.predicting) for of, z in ((expected, x), (found, y)))
    predictions = divergence(expected, found, x, y, batch.targets)
    return Quality(len(ids), WINDOW, errors, tuple(layers), predictions)


@dataclass(frozen=True)
class _Batch:
    """Windows of a text as one batch, the last one padded. Positions count from 0 to B * T - 1."""

    ids: mx.array  # [B, T]
    step: ForwardBatch
    valid: mx.array  # positions that are not padding
    predicting: mx.array  # positions whose next token is predicted
    targets: mx.array  # those tokens

    @staticmethod
    def of(ids: list[int]) -> _Batch:
        parts = list(windows(ids, WINDOW))
        lengths = [len(part) for part in parts]
        T = lengths[0]
        positions = np.arange(len(parts) * T).reshape(-1, T)
        return _Batch(
            mx.array([part + [0] * (T - len(part)) for part in parts]),
            ForwardBatch() if lengths[-1] == T else ForwardBatch.padded(lengths),
            mx.array(np.concatenate([row[:n] for row, n in zip(positions, lengths, strict=True)])),
            mx.array(
                np.concatenate([row[: n - 1] for row, n in zip(positions, lengths, strict=True)])
            ),
            mx.array([token for part in parts for token in part[1:]]),
        )


def _layer(
    expected: Layers, found: Layers, number: int, x: mx.array, y: mx.array, batch: _Batch
) -> tuple[LayerQuality, mx.array, mx.array]:
    """One layer's errors, and both residual streams after it; x is the unquantized model's."""
    weights = weight_errors(expected.reader, found.reader, expected.of(number))
    after = expected.run(number, x, batch.step)
    alone = _relative(after, found.run(number, x, batch.step), batch.valid)
    y = found.run(number, y, batch.step)
    kind = expected.config.layers[number]
    together = _relative(after, y, batch.valid)
    errors = LayerQuality(number, kind.attention, kind.feed_forward, weights, alone, together)
    return errors, after, y


def write(quality: Quality, out: Path) -> Path:
    """Write quality.json into the folder `out`, where nothing takes it for a part of the model."""
    path = out / FILE
    path.write_text(json.dumps(quality.json(), indent=2) + "\n", encoding="utf-8")
    return path


def _reader(folder: Path) -> TensorReader:
    config, checkpoint = ModelConfig.read(folder), Checkpoint(folder)
    check(config, checkpoint)
    return TensorReader(checkpoint, config)


def _rows(x: mx.array, positions: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])[positions]


def _relative(expected: mx.array, found: mx.array, positions: mx.array) -> float:
    squares = Squares()
    squares.add(_rows(expected, positions), _rows(found, positions))
    return squares.relative
