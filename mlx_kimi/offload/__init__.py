"""Routed experts that live on the disk: which are in memory, and how the others get there."""
