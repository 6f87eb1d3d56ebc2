"""The two halves of generation: `prefill` reads a prompt, `decode` draws what follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import mlx.core as mx

from mlx_kimi.defaults import PREFILL_STEP, PREFILL_STEP_LIMIT
from mlx_kimi.errors import OptionError
from mlx_kimi.generation.sample import Sampler
from mlx_kimi.generation.speculate import Speculation, decode_with_drafts
from mlx_kimi.generation.token_state import TokenState


def prefill(
    state: TokenState,
    ids: Sequence[int],
    step: int = PREFILL_STEP,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[mx.array, int]:
    """Read what `state` has not read of the prompt `ids`, `step` tokens at once.

    Under a memory budget never more than it has room for.

    Returns:
        The final hidden state of the last token, [1, 1, hidden], and how many tokens had been read
        before.

    Raises:
        KimiError: `step` is out of range.
    """
    check_prefill_step(step)
    if state.model.offload is not None:
        step = min(step, state.model.offload.prefill_step)
    with state.turn:
        state.answering = None  # whatever ends this: another answer in this state is over
        state.settle()
        hidden = state.rewind_to_prefix_of(ids)
        cached = len(state.ids)
        state.take_snapshot(hidden)  # where the turn begins
        with state.model.reading(ids[cached:], step):
            while hidden is None:
                done = len(state.ids)
                if progress:
                    progress(done, len(ids))
                hidden = state.read(ids[done : done + step], output_wanted=done + step >= len(ids))
        state.answering = hidden = hidden[...]  # a new array: the same prompt may be asked again
    return hidden, cached


def check_prefill_step(step: int, name: str = "prefill_step") -> None:
    """Refuse a step, an option of this name, outside 1 to `PREFILL_STEP_LIMIT`."""
    if not 1 <= step <= PREFILL_STEP_LIMIT:
        raise OptionError(name, f"must be from 1 to {PREFILL_STEP_LIMIT:,} but is {step:,}")


def decode(
    state: TokenState,
    hidden: mx.array,
    sampler: Sampler,
    limit: int,
    speculation: Speculation | None = None,
) -> Iterator[int]:
    """Yield up to `limit` tokens, of which `state` reads all but the last.

    The device computes the next token while the caller handles this one, which `state` has read by
    then. Under a memory budget a step may wait for files: there a token is read when the caller
    asks for the next.

    Args:
        hidden: of `prefill`.
        speculation: reads several tokens in a step where it expects to draw them; None: never.

    Raises:
        KimiError: the model's logits have NaN or +infinity, or another answer has begun in `state`.
    """
    how = _one_by_one if speculation is None else partial(decode_with_drafts, speculation)
    try:
        yield from how(state, hidden, sampler, limit)
    finally:
        with state.turn:
            if state.answering is hidden:
                state.settle()


def _one_by_one(state: TokenState, hidden: mx.array, sampler: Sampler, limit: int) -> Iterator[int]:
    waits_for_files = state.model.offload is not None
    with state.turn_of(hidden):
        draw = state.first_draw(hidden, sampler)
    for _ in range(limit - 1):
        if waits_for_files:
            with state.turn_of(hidden):
                token, draw = state.awaited(draw, sampler)
            yield token
        with state.turn_of(hidden):
            token, draw = state.step(draw, sampler, is_known=waits_for_files)
        if not waits_for_files:
            yield token
    with state.turn_of(hidden):
        token, _ = state.awaited(draw, sampler)
    yield token
