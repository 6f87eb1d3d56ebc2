"""What came of drafts in one answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Drafts:
    """Counts."""

    steps: int = 0  # with drafts
    proposed: int = 0  # tokens
    accepted: int = 0

    def __add__(self, other: Drafts) -> Drafts:
        return Drafts(
            self.steps + other.steps,
            self.proposed + other.proposed,
            self.accepted + other.accepted,
        )
