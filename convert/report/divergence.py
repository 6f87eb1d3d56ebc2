"""Two models' predictions compared over blocks of the vocabulary: lm_head is never whole."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_kimi.checkpoint.tensors import EMBEDDING, LM_HEAD
from mlx_kimi.convert.report.layerwise import Layers
from mlx_kimi.convert.report.slices import slices
from mlx_kimi.evaluation.evaluate import Distance, Evaluation, Prediction

BLOCK = 1024  # rows of the vocabulary


class _Softmax:
    """The softmax of N tokens in float64, as sums over the blocks of logits so far."""

    def __init__(self, came: np.ndarray) -> None:
        self.came = came
        self.high = np.full(len(came), -np.inf)  # the largest logit so far
        self.sum = np.zeros(len(came))  # of exp(logit - high)
        self.best = np.zeros(len(came), int)
        self.of_came = np.zeros(len(came))

    def add(self, first: int, logits: np.ndarray) -> np.ndarray:
        """Add the logits [N, V] of the ids from `first` on.

        Returns:
            The factor that rescales sums of exp(logit - high) made so far, [N].
        """
        best = logits.argmax(-1)
        largest = np.take_along_axis(logits, best[:, None], -1)[:, 0]
        self.best = np.where(largest > self.high, first + best, self.best)
        high = np.maximum(self.high, largest)
        shrink = np.exp(self.high - high)
        self.sum = self.sum * shrink + np.exp(logits - high[:, None]).sum(-1)
        self.high = high
        (here,) = np.nonzero((self.came >= first) & (self.came < first + logits.shape[1]))
        self.of_came[here] = logits[here, self.came[here] - first]
        return shrink

    @property
    def log_sum(self) -> np.ndarray:
        return self.high + np.log(self.sum)

    @property
    def prediction(self) -> Prediction:
        return Prediction(len(self.came), float((self.log_sum - self.of_came).mean()))


def divergence(
    source: Layers, out: Layers, expected: mx.array, found: mx.array, came: mx.array
) -> Evaluation:
    """The divergence of the predictions of `out` from those of `source`.

    Args:
        expected, found: what each model's last norm gave, [N, hidden].
        came: the tokens that came next, [N].
    """
    ids = np.array(came)
    p, q, cross = _Softmax(ids), _Softmax(ids), np.zeros(len(ids))
    name = EMBEDDING.name if source.config.tie_word_embeddings else LM_HEAD.name
    heads = (slices(layers.reader, layers.tensors[name], BLOCK) for layers in (source, out))
    for (first, ours), (_, theirs) in zip(*heads, strict=True):
        a = np.array(ours(expected)).astype(np.float64)
        b = np.array(theirs(found)).astype(np.float64)
        shrink = p.add(first, a)
        cross = cross * shrink + (np.exp(a - p.high[:, None]) * (a - b)).sum(-1)
        q.add(first, b)
        mx.clear_cache()
    # KL = sum of softmax(a) (log softmax(a) - log softmax(b))
    kl = cross / p.sum - p.log_sum + q.log_sum
    return Evaluation(
        model=q.prediction,
        reference=p.prediction,
        distance=Distance.of(kl, p.best == q.best),
    )
