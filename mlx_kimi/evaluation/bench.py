"""How fast a model reads and generates, by context length, in the loop that every answer takes."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import reduce
from operator import add
from random import Random
from statistics import median
from typing import Literal, TypeVar

import mlx.core as mx

from mlx_kimi.defaults import PREFILL_STEP
from mlx_kimi.errors import KimiError, OptionError
from mlx_kimi.generation.answer import Stats
from mlx_kimi.generation.drafts import Drafts
from mlx_kimi.generation.generate import check_lengths, stream_generate
from mlx_kimi.generation.speculate import Speculate
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.offload.stats import Counts
from mlx_kimi.text.tokenizer import Tokenizer

WARM_UP = 512  # tokens at most: every kernel compiles, no weight is touched for the first time
HOST_SHARE = 0.9  # of a token's time; from here on the host hardly waits for the device

Progress = Callable[[str, int, int], None]  # what is done, tokens done, tokens in all


@dataclass(frozen=True)
class BenchRow:
    """What was measured at one context length. Times are in seconds, memory in bytes."""

    context: int  # tokens
    read_tokens: int  # those after the row before; a longer context goes on from a shorter one
    read_time: float  # until the first token that follows them
    time_to_first_token: float  # of the whole context: the read_time of this row and all before
    token_times: tuple[float, ...]  # of one token, for each repeat
    host_times: tuple[float, ...]  # of these, the work to submit a token's step
    active_memory: int  # above the weights, once the context is read: what the cache holds
    peak_memory: int  # weights included
    experts: Counts | None = None  # of all repeats together; None without a memory budget
    drafts: Drafts | None = None  # of all repeats together; None: one token at a time

    @property
    def prompt_speed(self) -> float:
        """Tokens a second, of those that this row read."""
        return self.read_tokens / self.read_time

    @property
    def token_time(self) -> float:
        """Seconds a token takes: the median over the repeats."""
        return median(self.token_times)

    @property
    def host_time(self) -> float:
        """Of these, the host's work; the device works at the same time."""
        return median(self.host_times)

    @property
    def generation_speed(self) -> float:
        """Tokens a second."""
        return 1 / self.token_time

    @property
    def spread(self) -> float:
        """Half the range of the repeats, as a share of their median; 0 of one repeat."""
        return (max(self.token_times) - min(self.token_times)) / 2 / self.token_time

    @property
    def bound_by(self) -> Literal["host", "device"]:
        """Who the other waits for: they work at the same time, so the longer one takes it all."""
        return "host" if self.host_time >= HOST_SHARE * self.token_time else "device"


class Bench:
    """Measures one model at growing context lengths of one pseudo-random text.

    Tokens are greedy and no token ends an answer, so that every repeat does the same work.

    Attributes:
        weights_memory: what MLX held before the first token.
        length: the tokens of the longest context so far.
    """

    def __init__(
        self,
        model: KimiLinear,
        tokenizer: Tokenizer,
        *,
        tokens: int = 128,
        repeats: int = 3,
        prefill_step: int = PREFILL_STEP,
        seed: int = 0,
        speculate: Speculate = "off",
    ) -> None:
        check_settings(tokens, repeats, prefill_step)
        self.model, self.tokens, self.repeats = model, tokens, repeats
        self.prefill_step, self.speculate = prefill_step, speculate
        self.tokenizer = copy(tokenizer)
        self.tokenizer.stop_ids = frozenset()
        self.weights_memory = mx.get_active_memory()
        self.length, self._reading = 0, 0.0  # tokens, seconds
        self._text = _Text(tokenizer, seed)
        self._state = TokenState(model, snapshot_every=None)

    def row(self, length: int, progress: Progress = lambda what, done, total: None) -> BenchRow:
        """Measure at `length` tokens.

        Raises:
            KimiError: the answer does not fit the model's context.
            ValueError: `length` is not above the last one.
        """
        if length <= self.length:
            raise ValueError(f"[Bench] length must be above {self.length} but is {length}.")
        check_fits(length, self.tokens, self.model.config.model_max_length)
        if not self.length:
            self._answer(TokenState(self.model, snapshot_every=None), min(length, WARM_UP), 4)
        before, self.length = self.length, length

        mx.reset_peak_memory()
        reading = self._answer(
            self._state, length, 1, lambda done, total: progress("reading", done, total)
        )
        self._reading += reading.time_to_first_token
        self._rewind()
        active = mx.get_active_memory() - self.weights_memory
        runs = []
        for repeat in range(self.repeats):
            progress("generating", repeat * self.tokens, self.repeats * self.tokens)
            # One token more is read, since a prompt needs one that its state has not read.
            runs.append(self._answer(self._state, length + 1, self.tokens))
            self._rewind()
        steps = self.tokens - 1
        return BenchRow(
            context=length,
            read_tokens=length - before,
            read_time=reading.time_to_first_token,
            time_to_first_token=self._reading,
            token_times=tuple(run.decode_time / steps for run in runs),
            host_times=tuple(run.host_time / steps for run in runs),
            active_memory=active,
            peak_memory=mx.get_peak_memory(),
            experts=_sum([run.experts for run in runs if run.experts]),
            drafts=_sum([run.drafts for run in runs if run.drafts]),
        )

    def _answer(
        self,
        state: TokenState,
        length: int,
        tokens: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Stats:
        *_, last = stream_generate(
            self.model,
            self.tokenizer,
            self._text.start(length),
            max_tokens=tokens,
            prefill_step=self.prefill_step,
            progress=progress,
            state=state,
            speculate=self.speculate,
        )
        return last.stats

    def _rewind(self) -> None:
        """Back to the end of the context, and keep no other state."""
        self._state.rewind_to_prefix_of(self._text.start(self.length))
        del self._state.snapshots[:-1]


Summed = TypeVar("Summed", Counts, Drafts)


def _sum(counts: list[Summed]) -> Summed | None:
    return reduce(add, counts) if counts else None


def check_settings(tokens: int, repeats: int, prefill_step: int = PREFILL_STEP) -> None:
    """Refuse what nothing can be measured with."""
    for name, value, least in (("tokens", tokens, 2), ("repeats", repeats, 1)):
        if value < least:
            raise OptionError(name, f"must be at least {least} but is {value}")
    check_lengths(tokens, prefill_step)


def check_fits(
    length: int, tokens: int, limit: int, whose: str = "the model's context (model_max_length)"
) -> None:
    """Refuse a context that is empty, or leaves no room for what is read and generated after it.

    `whose`: what has the `limit`, for the error.
    """
    most = limit - tokens - 1
    if not 1 <= length <= most:
        raise KimiError(
            f"a context must have from 1 to {most:,} tokens but has {length:,}: {whose} holds "
            f"{limit:,}, and {tokens + 1:,} follow"
        )


class _Text:
    """Ordinary tokens without end, none of them a control token; a seed gives the same ones."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        control = set(tokenizer.control_tokens.values())
        self._ordinary = [id for id in range(tokenizer.vocab_size) if id not in control]
        self._random = Random(seed)
        self._ids: list[int] = []

    def start(self, length: int) -> list[int]:
        """The first `length` of them."""
        missing = max(length - len(self._ids), 0)
        self._ids += self._random.choices(self._ordinary, k=missing)
        return self._ids[:length]
