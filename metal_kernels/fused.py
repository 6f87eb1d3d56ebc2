"""Element-wise operations in one launch, where that needs no compiler of C++."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import mlx.core as mx

P = ParamSpec("P")
R = TypeVar("R")


def compiles() -> bool:
    """Whether functions are compiled here."""
    return mx.default_device() != mx.Device(mx.cpu)


def fused(shapeless: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`mx.compile` on a GPU. On a CPU MLX would start a C++ compiler, for a second a function.

    shapeless: one graph serves all shapes.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        compiled: Callable[P, R] = mx.compile(function, shapeless=shapeless)

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            return (compiled if compiles() else function)(*args, **kwargs)

        return run

    return decorate


@fused(shapeless=True)
def silu(x: mx.array) -> mx.array:
    """`x * sigmoid(x)`."""
    return x * mx.sigmoid(x)
