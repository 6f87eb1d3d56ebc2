"""Drafts for an answer that runs alone: read in one step with its latest token, kept where drawn.

Beside other rows a step is full, and nothing is guessed.
"""

from __future__ import annotations

from mlx_kimi.generation.drafts import Learned
from mlx_kimi.generation.lookup import Draft, Lookup
from mlx_kimi.generation.speculate import Speculation
from mlx_kimi.server.job import Job


class LoneRow:
    """What to guess of one job: its text is looked up as far as it is told."""

    def __init__(self, job: Job, learned: Learned) -> None:
        """`learned`: of the engine's answers before, and goes on with this one's."""
        self.job = job
        self.speculation = Speculation(Lookup(job.ids.tolist()), learned)
        self._looked_up = len(job.drawn)

    def propose(self, room: int) -> Draft:
        """What may follow the latest token that was told, `room` tokens at most."""
        told = self.job.drawn[self._looked_up :]
        self.speculation.drafter.add(told)
        self._looked_up += len(told)
        left = self.job.limit - len(self.job.drawn)
        return self.speculation.propose(min(room, left - 1))
