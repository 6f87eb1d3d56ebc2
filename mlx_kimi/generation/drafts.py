"""What came of drafts in one answer."""

from dataclasses import dataclass


@dataclass
class Drafts:
    """Counts."""

    steps: int = 0  # with drafts
    proposed: int = 0  # tokens
    accepted: int = 0
