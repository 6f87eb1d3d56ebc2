"""Which experts are worth keeping in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# The share of its worth that an expert keeps from one token to the next: near 0 it is LRU, at 1
# LFU. Chosen on the pocket model's routing (benchmarks/residency.py).
DECAY = 0.95


@dataclass
class LRFU:
    """What each expert is worth: the sum of its uses, each decayed with every token since.

    Lee et al., 2001, "LRFU: a spectrum of policies that subsumes the LRU and LFU policies".
    """

    scores: npt.NDArray[np.float64]  # [experts], or [layers, experts]
    decay: float = DECAY

    def note(self, chosen: npt.NDArray[np.int64]) -> None:
        """Count the experts that tokens chose, in order: [tokens, k], or [layers, tokens, k]."""
        tokens = chosen.shape[-2]
        decayed = self.decay ** np.arange(tokens - 1, -1, -1.0)
        self.scores *= self.decay**tokens
        layers = () if self.scores.ndim == 1 else (np.arange(len(self.scores))[:, None, None],)
        np.add.at(self.scores, (*layers, chosen), decayed[:, None])
