"""A prompt -> a stream of text: prefill in steps, then one token after another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx

from mlx_kimi.defaults import MAX_TOKENS, PREFILL_STEP
from mlx_kimi.errors import ContextFull, KimiError, beyond_budget
from mlx_kimi.generation.context import TokenState
from mlx_kimi.generation.sample import Sampler, Sampling
from mlx_kimi.model import cache as caches
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.offload.expert_cache import Counts
from mlx_kimi.text.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
FinishReason = Literal["stop", "length"]

DIAGNOSED = 64  # tokens of a text whose logits are not finite that are read again to say where


@dataclass(frozen=True)
class Stats:
    """Counts and speeds of one answer so far. Times are in seconds."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, those that a context had read before
    generated_tokens: int
    time_to_first_token: float
    decode_time: float  # from the first token to the latest
    host_time: float  # of this thread's processor, to submit the steps after the first token's
    peak_memory: int  # bytes
    seed: int
    experts: Counts | None = None  # of the tokens after the first; None without a memory budget

    @property
    def prompt_speed(self) -> float:
        """Prompt tokens read a second."""
        return (self.prompt_tokens - self.cached_tokens) / max(self.time_to_first_token, 1e-9)

    @property
    def generation_speed(self) -> float:
        """Tokens a second after the first; 0 when there is no second one."""
        return (self.generated_tokens - 1) / self.decode_time if self.decode_time > 0 else 0.0


@dataclass(frozen=True)
class Chunk:
    """What one token adds to the answer."""

    text: str  # may be empty: half a character, or what may be the beginning of a stop string
    token: int
    finish_reason: FinishReason | None  # on the last chunk
    stats: Stats


def generate(model: KimiLinear, tokenizer: Tokenizer, prompt: Prompt, **options: Any) -> str:
    """The whole answer of `stream_generate`, which explains the options and errors."""
    return "".join(chunk.text for chunk in stream_generate(model, tokenizer, prompt, **options))


def stream_generate(
    model: KimiLinear,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int = MAX_TOKENS,
    temp: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    tools: Sequence[dict[str, Any]] | None = None,
    prefill_step: int = PREFILL_STEP,
    latent_bits: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    context: TokenState | None = None,
) -> Generator[Chunk, None, None]:
    """Answer a prompt, one chunk a token.

    Args:
        prompt: text (the chat template is applied), a list of messages, or token ids (as they are).
        max_tokens: the answer's length at most; the context window may end it earlier.
        temp, top_k, top_p, min_p, repetition_penalty, seed: see `sample.Sampling`.
        stop: strings that end the answer; they are not part of it.
        tools: JSON schemas of functions that the model may call, for the chat template.
        prefill_step: prompt tokens read at once. More is faster and takes more memory.
        latent_bits: 8 keeps the latents of MLA layers in 8 bits; a `context` has bits of its own.
        progress: called with (tokens read, tokens of the prompt) after each prefill step.
        context: of an earlier call, whose tokens are not read again.

    Raises:
        KimiError: the prompt is empty or longer than the model's context, an option is absurd, or
            the model's logits are not finite.
    """
    check_lengths(max_tokens, prefill_step)
    sampling = Sampling(temp, top_k, top_p, min_p, repetition_penalty, seed)
    ids = prompt_ids(model, tokenizer, prompt, tools)
    room = model.config.model_max_length - len(ids)
    context = context or TokenState(model, latent_bits, every=None)
    sampler = Sampler(sampling, ids, model.config.vocab_size)
    counts = model.offload.counts if model.offload else None
    answer = _Answer(tokenizer, stop, min(max_tokens, room), len(ids), sampler.seed, counts)

    def sampled(hidden: mx.array) -> tuple[mx.array, mx.array]:
        """The next token [1], and what is finite [1] if all logits are; submitted."""
        logits = model.logits(hidden[:, -1])
        token, total = sampler(logits), mx.logsumexp(logits, axis=-1)
        mx.async_eval(token, total, *caches.arrays(context.entries))
        return token, total

    def read(token: mx.array) -> tuple[mx.array, mx.array]:
        # Processor time: MLX lets a thread that is far ahead of the device wait in here.
        before = time.thread_time()
        following = sampled(context.forward(token[:, None]))
        answer.host_time += time.thread_time() - before
        return following

    hidden, answer.cached_tokens = prefill(context, ids, prefill_step, progress)
    token, total = sampled(hidden)

    ahead = model.offload is None  # (a step that waits for files comes after the text)
    while True:
        following = None
        with context.atomic():
            if ahead and not answer.is_last:  # it computes while this token's text is handled
                following = read(token)
            number = int(token.item())  # type: ignore[arg-type]
            if not math.isfinite(total.item()):  # type: ignore[arg-type]
                raise not_finite(model, context.ids)
            if following is not None:
                context.ids.append(number)
        context.keep_now_and_then()
        chunk = answer.add(number)
        yield chunk
        if chunk.finish_reason:
            return
        if following is None:
            with context.atomic():
                following = read(token)
                context.ids.append(number)
        token, total = following


def not_finite(model: KimiLinear, ids: Sequence[int]) -> KimiError:
    """The error of logits that are NaN or infinity after the tokens `ids`.

    A short run finds the layer, if it is one's weights.
    """
    place = model.first_not_finite(mx.array([list(ids[-DIAGNOSED:])]))
    where = f"{place} is the first to give such values" if place else "this text leads to it"
    return KimiError(
        f"the model's logits are NaN or infinity after {len(ids):,} tokens: {where}; "
        "its weights are damaged or its dtype is too narrow"
    )


def prompt_ids(
    model: KimiLinear,
    tokenizer: Tokenizer,
    prompt: Prompt,
    tools: Sequence[dict[str, Any]] | None = None,
) -> list[int]:
    """The tokens of a prompt, checked against the model's context and vocabulary."""
    if isinstance(prompt, str):
        if not prompt:
            raise KimiError("the prompt is empty")
        prompt = [{"role": "user", "content": prompt}]
    ids: list[Any] = list(prompt)
    if ids and isinstance(ids[0], Mapping):
        ids = tokenizer.apply_chat_template(ids, list(tools) if tools else None)
    if not ids:
        raise KimiError("the prompt is empty")
    limit, vocab = model.config.model_max_length, model.config.vocab_size
    if len(ids) >= limit:
        if model.offload and model.offload.bounds_context:
            raise ContextFull(beyond_budget("the prompt", len(ids), limit))
        raise ContextFull(
            f"the prompt has {len(ids):,} tokens but the model's context (model_max_length) "
            f"holds {limit:,}, the answer included"
        )
    outside = next((token for token in ids if not 0 <= token < vocab), None)
    if outside is not None:
        raise KimiError(f"token ids must be from 0 to {vocab - 1} but the prompt has {outside}")
    return ids


def prefill(
    context: TokenState,
    ids: list[int],
    step: int = PREFILL_STEP,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[mx.array, int]:
    """Read what `context` has not read of the prompt `ids`.

    Returns:
        The last layer's output for the last token, [1, 1, hidden], and how many tokens had been
        read before.
    """
    last = context.rewind_to_prefix_of(ids)
    known = len(context.ids)
    context.keep(last)  # where the turn begins
    while last is None:
        done = len(context.ids)
        if progress:
            progress(done, len(ids))
        part = ids[done : done + step]
        with context.atomic():
            if done + len(part) == len(ids):
                last = mx.contiguous(context.forward(mx.array([part]))[:, -1:])
            else:
                context.advance(mx.array([part]))
            context.ids += part
        if last is not None:
            context.keep(last)
        else:
            mx.eval(caches.arrays(context.entries))
            context.keep_now_and_then()
    return last, known


class _Answer:
    """Turns tokens into chunks: text, stop conditions, counts and times."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        limit: int,
        prompt_tokens: int,
        seed: int,
        counts: Counts | None,
    ) -> None:
        self.detokenizer = tokenizer.detokenizer()
        self.stop_ids = tokenizer.stop_ids
        self.stop = StopStrings(stop)
        self.limit, self.prompt_tokens, self.seed = limit, prompt_tokens, seed
        self.cached_tokens = self.count = 0
        self.counts, self._counts_at_first = counts, Counts()
        self.started = time.perf_counter()
        self.first = self.latest = self.host_time = 0.0

    @property
    def is_last(self) -> bool:
        """The token that comes next is the last that fits."""
        return self.count + 1 >= self.limit

    def add(self, token: int) -> Chunk:
        self.count += 1
        if self.counts and self.count == 1:
            self._counts_at_first = replace(self.counts)
        self.latest = time.perf_counter()
        self.first = self.first or self.latest
        reason: FinishReason | None = "length" if self.count >= self.limit else None
        if token in self.stop_ids:
            reason = "stop"
        else:
            text = self.stop.add(self.detokenizer.add(token))
        if reason:
            rest = self.stop.add(self.detokenizer.finish())
            text = ("" if token in self.stop_ids else text) + rest + self.stop.finish()
        if self.stop.met:
            reason = "stop"
        return Chunk(text, token, reason, self._stats())

    def _stats(self) -> Stats:
        return Stats(
            self.prompt_tokens,
            self.cached_tokens,
            self.count,
            self.first - self.started,
            self.latest - self.first,
            self.host_time,
            mx.get_peak_memory(),
            self.seed,
            None if self.counts is None else self.counts - self._counts_at_first,
        )


class StopStrings:
    """Passes text on up to the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = [text for text in stop if text]
        self.held = ""
        self.met = False

    def add(self, text: str) -> str:
        """The text that is certainly part of the answer; `met` once a stop string is complete."""
        if self.met:
            return ""
        self.held += text
        found = [place for place in map(self.held.find, self.stop) if place >= 0]
        if found:
            self.met = True
            return self._release(min(found))
        longest = max(
            (n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0
        )
        return self._release(len(self.held) - longest)

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        return "" if self.met else self._release(len(self.held))

    def _release(self, count: int) -> str:
        text, self.held = self.held[:count], self.held[count:]
        return text


def check_lengths(max_tokens: int, prefill_step: int) -> None:
    """Refuse lengths below 1."""
    for name, value in (("max_tokens", max_tokens), ("prefill_step", prefill_step)):
        if value < 1:
            raise KimiError(f"{name} must be at least 1 but is {value}")
