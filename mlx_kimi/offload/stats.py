"""Hits, misses and reads of routed experts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counts:
    """What finding the experts of all layers cost. Times are in seconds."""

    lookups: int = 0  # experts that a token chose, or that a prefill step needed
    misses: int = 0  # of these, those that were in no slot and were read
    bytes_read: int = 0
    stall_time: float = 0.0  # waiting for files

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.lookups + other.lookups,
            self.misses + other.misses,
            self.bytes_read + other.bytes_read,
            self.stall_time + other.stall_time,
        )

    def __sub__(self, before: Counts) -> Counts:
        """What it cost since `before`."""
        return Counts(
            self.lookups - before.lookups,
            self.misses - before.misses,
            self.bytes_read - before.bytes_read,
            self.stall_time - before.stall_time,
        )

    @property
    def hit_rate(self) -> float:
        """The share of lookups that found the expert in memory; 1 before any."""
        return 1 - self.misses / self.lookups if self.lookups else 1.0
