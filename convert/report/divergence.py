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

    def __init__(self, targets: np.ndarray) -> None:
        self.targets = targets
        self.max = np.full(len(targets), -np.inf)  # of the logits so far
        self.exp_sum = np.zeros(len(targets))  # of exp(logit - max)
        self.argmax = np.zeros(len(targets), int)
        self.target_logit = np.zeros(len(targets))

    def add(self, first: int, logits: np.ndarray) -> np.ndarray:
        """Add the logits [N, V] of the ids from `first` on.

        Returns:
            The factor that rescales sums of exp(logit - max) made so far, [N].
        """
        best = logits.argmax(-1)
        largest = np.take_along_axis(logits, best[:, None], -1)[:, 0]
        self.argmax = np.where(largest > self.max, first + best, self.argmax)
        new_max = np.maximum(self.max, largest)
        rescale = np.exp(self.max - new_max)
        self.exp_sum = self.exp_sum * rescale + np.exp(logits - new_max[:, None]).sum(-1)
        self.max = new_max
        (here,) = np.nonzero((self.targets >= first) & (self.targets < first + logits.shape[1]))
        self.target_logit[here] = logits[here, self.targets[here] - first]
        return rescale

    @property
    def lse(self) -> np.ndarray:
        """log(sum(exp(logits))), [N]."""
        return self.max + np.log(self.exp_sum)

    @property
    def prediction(self) -> Prediction:
        return Prediction(len(self.targets), float((self.lse - self.target_logit).mean()))


def divergence(
    source: Layers, out: Layers, expected: mx.array, found: mx.array, targets: mx.array
) -> Evaluation:
    """The divergence of the predictions of `out` from those of `source`.

    Args:
        expected, found: what each model's last norm gave, [N, hidden].
        targets: the tokens that come next, [N].
    """
    ids = np.array(targets)
    p, q, cross = _Softmax(ids), _Softmax(ids), np.zeros(len(ids))
    name = EMBEDDING.name if source.config.tie_word_embeddings else LM_HEAD.name
    heads = (slices(layers.reader, layers.tensors[name], BLOCK) for layers in (source, out))
    for (first, ours), (_, theirs) in zip(*heads, strict=True):
        a = np.array(ours(expected)).astype(np.float64)
        b = np.array(theirs(found)).astype(np.float64)
        rescale = p.add(first, a)
        cross = cross * rescale + (np.exp(a - p.max[:, None]) * (a - b)).sum(-1)
        q.add(first, b)
        mx.clear_cache()
    # KL = sum of softmax(a) (log softmax(a) - log softmax(b))
    kl = cross / p.exp_sum - p.lse + q.lse
    return Evaluation(
        model=q.prediction,
        reference=p.prediction,
        distance=Distance.of(kl, p.argmax == q.argmax),
    )
