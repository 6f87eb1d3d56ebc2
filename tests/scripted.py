"""Tokens fed at the sampler: a real engine reads, steps and keeps states, and draws what a script
says of each prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat

import mlx.core as mx
import pytest

from mlx_kimi.generation.sample import BatchSampler, Sampler
from mlx_kimi.server.job import Job
from mlx_kimi.text.tokenizer import Tokenizer

Say = Callable[[str], str]  # a prompt, as text with its control tokens -> an answer, likewise


class _Fed(Sampler):
    """Draws the tokens that it is given."""

    rest: Iterator[int]

    def __call__(self, logits: mx.array) -> mx.array:
        return mx.array([next(self.rest)], mx.uint32)


@contextmanager
def scripted(tokenizer: Tokenizer, say: Say) -> Iterator[None]:
    """Every answer is what `say` says of its prompt."""
    sampler, end = Job.sampler, tokenizer.control_tokens["<|im_end|>"]
    fed: dict[int, _Fed] = {}  # by their options, which a batch of rows keeps

    def of_job(job: Job, vocab_size: int) -> Sampler:
        prompt = tokenizer.decode(job.prompt.tolist(), skip_control=False)
        ids = tokenizer.encode_with_control(say(prompt))
        found = sampler(job, vocab_size)
        found.__class__ = _Fed
        assert isinstance(found, _Fed)
        found.rest = iter([*ids[len(job.drawn) :], *repeat(end, 1000)])
        fed[id(found.sampling)] = found
        return found

    def of_rows(rows: BatchSampler, logits: mx.array) -> mx.array:
        return mx.concatenate([fed[id(row.sampling)](logits) for row in rows._rows])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "sampler", of_job)
        patch.setattr(BatchSampler, "__call__", of_rows)
        yield


def call(name: str, index: int, arguments: str) -> str:
    """An answer that calls one function."""
    return (
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:{index}"
        f"<|tool_call_argument_begin|>{arguments}<|tool_call_end|><|tool_calls_section_end|>"
    )
