"""How close two results are: never element by element, since small elements carry large errors."""

from typing import Any

import mlx.core as mx
import numpy as np


def numbers(x: Any) -> np.ndarray:
    """An array of any library in float64."""
    return np.array(x.astype(mx.float32) if isinstance(x, mx.array) else x, np.float64)


def assert_close(name: str, ours: Any, oracle: Any, largest: float) -> None:
    """Fail unless `ours` is finite and max|ours - oracle| / max|oracle| is within `largest`."""
    ours, oracle = numbers(ours), numbers(oracle)
    assert ours.shape == oracle.shape, f"{name}: shape {ours.shape}, expected {oracle.shape}"
    error = np.abs(ours - oracle).max() / max(np.abs(oracle).max(), 1e-30)
    assert error <= largest, f"{name}: max error {error:.1e}, tolerance {largest:.0e}"


def assert_same_bits(name: str, ours: Any, other: Any) -> None:
    """Fail unless both arrays are equal bit for bit (and hold no NaN)."""
    ours, other = np.array(ours), np.array(other)
    assert ours.shape == other.shape, f"{name}: shapes {ours.shape} and {other.shape}"
    differ = int((ours != other).sum())
    assert differ == 0, f"{name}: {differ} of {ours.size} elements differ"
