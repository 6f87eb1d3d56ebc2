"""The delta rule, in whichever implementation suits the number of tokens and the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mlx_kimi.metal_kernels import kda_chunk, kda_decode, kda_sequential
from mlx_kimi.metal_kernels.kernel import not_running
from mlx_kimi.metal_kernels.tuning import tuning


class Implementation(NamedTuple):
    """One implementation of the operator, and why it was chosen."""

    run: Callable[..., tuple[mx.array, mx.array]]  # arguments and results of naive_kda
    why: str

    @property
    def name(self) -> str:
        return self.run.__name__


def kda(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    alpha: mx.array,
    beta: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    """`naive_kda`, chosen in this one place; the arguments and results are its own."""
    chosen = chosen_implementation(q.shape[1], q.shape[-1], v.shape[-1])
    return chosen.run(q, k, v, alpha, beta, state)


def chosen_implementation(T: int, Dk: int, Dv: int) -> Implementation:
    """The implementation that takes T tokens of heads of this size at this moment."""
    if T == 1:
        return Implementation(kda_sequential.naive_kda, "one token: a few MLX operations")
    chunked_from = tuning().chunked_from
    many = T >= chunked_from
    kernels = kda_chunk if many else kda_sequential
    why = not_running(*kernels.KERNELS) or kernels.unsupported_reason(Dk, Dv)
    if why is not None:
        return Implementation(kda_chunk.kda_chunk, why)
    if many:
        return Implementation(kda_chunk.kda_chunk_kernel, f"{chunked_from} tokens or more")
    return Implementation(kda_sequential.kda_sequential_kernel, f"fewer than {chunked_from} tokens")


def decode_unsupported_reason(weights: kda_decode.DecodeWeights, D: int) -> str | None:
    """Why a layer's decode step takes the way of many tokens; None: `kda_decode` takes it."""
    return not_running(*kda_decode.KERNELS) or kda_decode.unsupported_reason(weights, D)
