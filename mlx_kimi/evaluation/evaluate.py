"""How well a model predicts a text, and how far its predictions are from another model's.

Two models are never in memory at the same time: the first one's predictions wait in a file.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_kimi.defaults import EVALUATED_TOKENS, WINDOW
from mlx_kimi.errors import KimiError, OptionError
from mlx_kimi.generation.not_finite import not_finite
from mlx_kimi.loading.load import load
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.text.tokenizer import Tokenizer
from mlx_kimi.units import human_size

ROWS = 128  # tokens whose predictions are in memory at once: 84 MB for the 48B
LAST = 0.99  # of the tokens: the KL that no more than 1 % exceed

Progress = Callable[[int, int], None]  # tokens done, tokens in all; once for each model


@dataclass(frozen=True)
class Prediction:
    """Of one model. Losses are in nats a token."""

    tokens: int  # that were predicted: all but the first of each window
    loss: float  # mean of -log p(token)

    @property
    def perplexity(self) -> float:
        return exp(self.loss)


@dataclass(frozen=True)
class Distance:
    """From a reference's predictions to a model's, over the same tokens."""

    mean_kl: float  # of KL(reference || model), in nats
    median_kl: float
    high_kl: float  # 99 % of the tokens have less
    agreement: float  # share of the tokens whose likeliest is the same

    @staticmethod
    def of(kl: np.ndarray, same: np.ndarray) -> Distance:
        """Of each token [N]: the divergence, and whether the likeliest is the same."""
        return Distance(
            float(kl.mean()),
            float(np.median(kl)),
            float(np.quantile(kl, LAST)),
            float(same.mean()),
        )


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; the last two only where there is a reference."""

    model: Prediction
    reference: Prediction | None = None
    distance: Distance | None = None

    def json(self) -> dict[str, Any]:
        """All there is, perplexities included."""
        whole = asdict(self)
        for name in ("model", "reference"):
            if prediction := getattr(self, name):
                whole[name]["perplexity"] = prediction.perplexity
        return whole


def evaluate(
    folder: Path,
    text: str,
    against: Path | None = None,
    *,
    tokens: int = EVALUATED_TOKENS,
    window: int = WINDOW,
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Let a model predict a text and, with `against`, compare it with that folder's model.

    Args:
        tokens: of the text, from its beginning.
        window: tokens that are read together.

    Raises:
        KimiError: the text is too short, the tokenizers differ, or the disk is too full to keep
            the reference's predictions.
    """
    for name, value in (("tokens", tokens), ("window", window)):
        if value < 2:
            raise OptionError(name, f"must be at least 2 but is {value}")
    if against is None:
        ids, model = _opened(folder, text, tokens)
        losses = [part for part, _ in _predictions(model, ids, window, progress)]
        return Evaluation(_prediction(losses))
    ids, reference = _opened(against, text, tokens)
    vocab = reference.config.vocab_size
    with tempfile.TemporaryDirectory() as place:
        kept = _kept(Path(place), ids, window, vocab)
        losses, row = [], 0
        for part, log_p in _predictions(reference, ids, window, progress):
            kept[row : row + len(log_p)] = log_p
            losses.append(part)
            row += len(log_p)
        expected = _prediction(losses)
        del reference
        mx.clear_cache()
        own_ids, model = _opened(folder, text, tokens)
        if own_ids != ids or model.config.vocab_size != vocab:
            raise KimiError(
                f"{folder} and {against} have other tokenizers: they cannot be compared"
            )
        return _compared(model, ids, window, kept, expected, progress)


def _opened(folder: Path, text: str, tokens: int) -> tuple[list[int], KimiLinear]:
    model, tokenizer = load(folder)
    return first_tokens(tokenizer, text, tokens), model


def first_tokens(tokenizer: Tokenizer, text: str, count: int) -> list[int]:
    """So many tokens of a text, or all that it has.

    Raises:
        KimiError: that is not enough to predict one.
    """
    ids = tokenizer.encode(text)[:count]
    if len(ids) < 2:
        raise KimiError(f"the text must have at least 2 tokens but has {len(ids)}")
    return ids


def windows(ids: list[int], window: int) -> Iterator[list[int]]:
    """What is read together; a last token that would stand alone is left out."""
    for start in range(0, len(ids), window):
        if len(part := ids[start : start + window]) > 1:
            yield part


def _predictions(
    model: KimiLinear, ids: list[int], window: int, progress: Progress
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of up to ROWS tokens at a time: -log p of what came [n], and log p of all [n, vocab]."""
    done = 0
    for part in windows(ids, window):
        hidden = model.hidden(mx.array([part]))[0]
        for start in range(0, len(part) - 1, ROWS):
            stop = min(start + ROWS, len(part) - 1)
            logits = model.logits(hidden[start:stop]).astype(mx.float32)
            log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            came = mx.array(part[start + 1 : stop + 1])
            losses = -mx.take_along_axis(log_p, came[:, None], axis=-1)[:, 0]
            found = np.array(losses)
            if not np.isfinite(found).all():
                raise not_finite(model, ids[: done + stop])
            yield found, np.array(log_p)
        done += len(part)
        progress(done, len(ids))


def _prediction(losses: list[np.ndarray]) -> Prediction:
    every = np.concatenate(losses).astype(np.float64)
    return Prediction(every.size, float(every.mean()))


def _kept(place: Path, ids: list[int], window: int, vocab: int) -> Any:
    """A file for the predictions of all tokens, [n, vocab] float32."""
    rows = sum(len(part) - 1 for part in windows(ids, window))
    size, free = rows * vocab * 4, shutil.disk_usage(place).free
    if size > free:
        raise KimiError(
            f"the predictions of {rows:,} tokens take {human_size(size)} but {place} has "
            f"{human_size(free)} free; --tokens takes fewer"
        )
    return np.lib.format.open_memmap(place / "kept.npy", "w+", np.float32, (rows, vocab))


def _compared(
    model: KimiLinear,
    ids: list[int],
    window: int,
    kept: Any,
    expected: Prediction,
    progress: Progress,
) -> Evaluation:
    losses, divergences, same, row = [], [], [], 0
    for part, log_p in _predictions(model, ids, window, progress):
        reference = np.array(kept[row : row + len(log_p)], np.float64)
        divergences.append((np.exp(reference) * (reference - log_p)).sum(-1))
        same.append(reference.argmax(-1) == log_p.argmax(-1))
        losses.append(part)
        row += len(log_p)
    distance = Distance.of(np.concatenate(divergences), np.concatenate(same))
    return Evaluation(_prediction(losses), expected, distance)
