"""Inputs of the delta rule with gates of every strength, and its recurrence in float64."""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np


class Inputs(NamedTuple):
    """The arguments of naive_kda, as float32 numpy arrays; of the decays, the logs."""

    q: np.ndarray  # [B, T, H, Dk]
    k: np.ndarray
    v: np.ndarray  # [B, T, H, Dv]
    log_alpha: np.ndarray  # [B, T, H, Dk]
    beta: np.ndarray  # [B, T, H]
    state: np.ndarray  # [B, H, Dv, Dk]

    def arrays(self) -> list[mx.array]:
        alpha = np.exp(self.log_alpha.astype(np.float64)).astype(np.float32)
        return [mx.array(x) for x in self._replace(log_alpha=alpha)]

    def cut(self, start: int, stop: int | None = None) -> "Inputs":
        """The tokens from start to stop; the state stays."""
        return Inputs(*(x[:, start:stop] for x in self[:-1]), self.state)


def recurrence(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """S <- diag(alpha) S;  S <- S + beta k (v - S^T k)^T;  o = S^T q;  in float64."""
    q, k, v, log_alpha, beta, state = (x.astype(np.float64) for x in inputs)
    S = state.swapaxes(-1, -2)  # [B, H, Dk, Dv]
    outputs = []
    for t in range(q.shape[1]):
        S = np.exp(log_alpha[:, t])[..., None] * S
        correction = v[:, t] - (k[:, t, :, None] @ S)[:, :, 0]
        S += (beta[:, t, :, None] * k[:, t])[..., None] * correction[:, :, None, :]
        outputs.append((q[:, t, :, None] @ S)[:, :, 0])
    return np.stack(outputs, axis=1), S.swapaxes(-1, -2)


def random_inputs(
    B: int = 1, T: int = 250, H: int = 3, Dk: int = 64, Dv: int | None = None, seed: int = 0
) -> Inputs:
    """Typical gates, as a freshly initialised model has them, and a state that is not zero."""
    Dv = Dv or Dk
    rng = np.random.default_rng([seed, B, T, H, Dk, Dv])

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)

    A = rng.uniform(1, 16, (H, 1))
    dt_bias = np.log(np.expm1(np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), (H, Dk)))))
    f = rng.standard_normal((B, T, H, Dk))
    inputs = (
        unit(rng.standard_normal((B, T, H, Dk))) * Dk**-0.5,
        unit(rng.standard_normal((B, T, H, Dk))),
        rng.standard_normal((B, T, H, Dv)),
        -A * np.logaddexp(f + dt_bias, 0),
        1 / (1 + np.exp(-rng.standard_normal((B, T, H)))),
        rng.standard_normal((B, H, Dv, Dk)),
    )
    return Inputs(*(x.astype(np.float32) for x in inputs))


def strong(x: Inputs, rng: np.random.Generator) -> Inputs:
    """A state that is all but gone after each token."""
    return x._replace(log_alpha=-rng.uniform(3, 80, x.k.shape))


def mixed(x: Inputs, rng: np.random.Generator) -> Inputs:
    """Channels that forget everything between channels that forget nothing."""
    return x._replace(log_alpha=np.where(np.arange(x.k.shape[-1]) % 2, -50.0, 0.0) + 0 * x.k)


def switched_off(x: Inputs, rng: np.random.Generator) -> Inputs:
    """24 tokens that forget, then slow decay: what differences of cumulated gates lose."""
    early = np.arange(x.k.shape[1])[:, None, None] < 24
    return x._replace(log_alpha=np.where(early, -50.0, -0.01) + 0 * x.k)


def switching(x: Inputs, rng: np.random.Generator) -> Inputs:
    """Each channel of each token at random."""
    return x._replace(log_alpha=np.where(rng.random(x.k.shape) < 0.5, -30.0, -0.03))


def log_uniform(x: Inputs, rng: np.random.Generator) -> Inputs:
    """Gates over nine orders of magnitude."""
    return x._replace(log_alpha=-(10 ** rng.uniform(-6, 3, x.k.shape)))


def half_at_1000(x: Inputs, rng: np.random.Generator) -> Inputs:
    """exp(-1000) is zero in float32, and exp(1000) infinite."""
    return x._replace(log_alpha=np.where(rng.random(x.k.shape) < 0.5, -1000.0, x.log_alpha))


def identical_keys(x: Inputs, rng: np.random.Generator) -> Inputs:
    """One key written again and again: the powers of its gram matrix grow like binomials."""
    return x._replace(
        k=x.k[:, :1] + 0 * x.k, log_alpha=0 * x.k - 1e-3, beta=0 * x.beta + np.float32(0.9995)
    )


def repeated_keys(x: Inputs, rng: np.random.Generator) -> Inputs:
    """Two keys in turn, each one written fully and never forgotten."""
    return x._replace(k=x.k[:, np.arange(x.k.shape[1]) % 2], log_alpha=0 * x.k, beta=0 * x.beta + 1)


def opposite_keys(x: Inputs, rng: np.random.Generator) -> Inputs:
    """+k, -k, +k, with a decay that forgets within tens of tokens.

    Slower ones err by more: exp(g) in float32 is off by 3e-8 once for each token remembered.
    """
    signs = np.where(np.arange(x.k.shape[1]) % 2, -1, 1)[:, None, None]
    return x._replace(k=x.k[:, :1] * signs, log_alpha=0 * x.k - 0.05, beta=0 * x.beta + 1)


def nothing_forgotten(x: Inputs, rng: np.random.Generator) -> Inputs:
    """No decay; some tokens write fully, the others not at all."""
    return x._replace(log_alpha=0 * x.k, beta=rng.integers(0, 2, x.beta.shape))


def large_values(x: Inputs, rng: np.random.Generator) -> Inputs:
    """State and values far from 1, and tokens without a key."""
    k = np.where(rng.random(x.beta.shape)[..., None] < 0.2, 0, x.k)
    return x._replace(k=k, state=x.state * 100, v=x.v * 200)


def typical(x: Inputs, rng: np.random.Generator) -> Inputs:
    """Gates of a freshly initialised model."""
    return x


GATES: dict[str, Callable[[Inputs, np.random.Generator], Inputs]] = {
    "typ": typical,
    "strong": strong,
    "mixed": mixed,
    "swoff": switched_off,
    "swch": switching,
    "logu": log_uniform,
    "m1000": half_at_1000,
    "idn": identical_keys,
    "repeated": repeated_keys,
    "opposite": opposite_keys,
    "no_decay": nothing_forgotten,
    "large": large_values,
}


def case(name: str, **shape: int) -> Inputs:
    inputs = GATES[name](random_inputs(**shape), np.random.default_rng(7))
    return Inputs(*(x.astype(np.float32) for x in inputs))
