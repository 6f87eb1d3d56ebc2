"""A prompt -> a stream of text."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from operator import index
from typing import Any, TypedDict

import mlx.core as mx
from typing_extensions import Unpack

from mlx_kimi.defaults import MAX_TOKENS, PREFILL_STEP
from mlx_kimi.errors import ContextFull, KimiError, OptionError, beyond_budget
from mlx_kimi.generation.answer import Answer, Chunk
from mlx_kimi.generation.decode import check_prefill_step, decode, prefill
from mlx_kimi.generation.sample import Sampler, Sampling
from mlx_kimi.generation.speculate import Speculate, speculation_for
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.text.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int] | mx.array
ROLES = ("system", "developer", "user", "assistant", "tool")


class Options(TypedDict, total=False):
    """Those of `stream_generate`, which explains them."""

    max_tokens: int
    temp: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    tools: Sequence[dict[str, Any]] | None
    json_schema: Mapping[str, Any] | None
    prefill_step: int
    latent_bits: int | None
    progress: Callable[[int, int], None] | None
    state: TokenState | None
    speculate: Speculate


def generate(
    model: KimiLinear, tokenizer: Tokenizer, prompt: Prompt, **options: Unpack[Options]
) -> str:
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
    stop: str | Sequence[str] = (),
    tools: Sequence[dict[str, Any]] | None = None,
    json_schema: Mapping[str, Any] | None = None,
    prefill_step: int = PREFILL_STEP,
    latent_bits: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    state: TokenState | None = None,
    speculate: Speculate = "off",
) -> Generator[Chunk, None, None]:
    """Answer a prompt, one chunk a token.

    Args:
        prompt: text (the chat template is applied), a list of messages, each with a role and
            content, or token ids (as they are).
        max_tokens: the answer's length at most; the context window may end it earlier.
        temp, top_k, top_p, min_p, repetition_penalty, seed: see `sample.Sampling`.
        stop: a string, or several, that end the answer; they are not part of it.
        tools: JSON schemas of functions that the model may call, for the chat template. Calls name
            one of them, and their arguments obey its schema: see `constraints.constraint_for`.
        json_schema: what the answer is JSON of, unless it is a call. The model is not told of it.
        prefill_step: prompt tokens read at once, 65,536 at most. More is faster and takes memory.
        latent_bits: 8 keeps the latents of MLA layers in 8 bits; ignored if `state` is given.
        progress: called with (tokens read, tokens of the prompt) before each prefill step.
        state: of an earlier call, and updated by this one. What both prompts begin with is taken
            from its snapshots, as far as they reach.
        speculate: "auto" reads several tokens in a step where the text seems to repeat itself, and
            keeps those that would have been drawn. Not under a memory budget, unless all experts
            are in memory.

    Raises:
        KimiError: the prompt is empty or fills the model's context, an option is out of range, the
            model's logits have NaN or +infinity, or a schema cannot be enforced.
    """
    check_lengths(max_tokens, prefill_step)
    sampling = Sampling(temp, top_k, top_p, min_p, repetition_penalty, seed)
    ids = prompt if isinstance(prompt, PromptIds) else prompt_ids(model, tokenizer, prompt, tools)
    limit = min(max_tokens, model.config.model_max_length - len(ids))
    state = state or TokenState(model, latent_bits, snapshot_every=None)
    matcher = None
    if json_schema is not None or tools:
        from mlx_kimi.constraints.constraint import constraint_for  # here: it takes 50 ms

        constraint = constraint_for(tokenizer, json_schema=json_schema, tools=tools)
        matcher = constraint.begin() if constraint else None
    sampler = Sampler(sampling, ids, model.config.vocab_size, matcher)
    stop = (stop,) if isinstance(stop, str) else stop
    speculation = speculation_for(state, speculate, ids)
    drafts = speculation.counts if speculation else None
    answer = Answer(tokenizer, stop, limit, len(ids), sampler.seed, state, drafts)

    hidden, answer.cached_tokens = prefill(state, ids, prefill_step, progress)
    for token in decode(state, hidden, sampler, limit, speculation):
        chunk = answer.add(token)
        yield chunk
        if chunk.finish_reason:
            return


class PromptIds(tuple[int, ...]):
    """The tokens of a prompt that have been checked and cannot change."""


def text_ids(model: KimiLinear, tokenizer: Tokenizer, ids: Sequence[int]) -> PromptIds:
    """What a model's `tokenizer` gave for a text, checked as a prompt.

    Raises:
        KimiError: as of `check_ids`.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        check_ids(model, ids)
    check_length(model, ids)
    return PromptIds(ids)


def prompt_ids(
    model: KimiLinear,
    tokenizer: Tokenizer,
    prompt: Prompt,
    tools: Sequence[dict[str, Any]] | None = None,
) -> list[int]:
    """The tokens of a prompt, checked against the model's context and vocabulary.

    Raises:
        KimiError: it is empty, too long, or neither text, messages nor ids.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    if isinstance(prompt, mx.array):
        prompt = prompt.tolist()  # type: ignore[assignment]
    if isinstance(prompt, (bytes, bytearray, Mapping)) or not isinstance(prompt, Sequence):
        raise KimiError(f"the prompt must be text, messages or token ids but is {kind(prompt)}")
    if not prompt:
        raise KimiError("the prompt is empty")
    if isinstance(prompt[0], Mapping):
        messages: list[Any] = list(prompt)
        for number, message in enumerate(messages):
            _check_message(number, message)
        ids = tokenizer.apply_chat_template(messages, list(tools) if tools else None)
    else:
        ids = [_token_id(number, token) for number, token in enumerate(prompt)]
    check_ids(model, ids)
    return ids


def check_ids(model: KimiLinear, ids: Sequence[int]) -> None:
    """Refuse a prompt that the model cannot read and answer.

    Raises:
        ContextFull: it fills the model's context.
        KimiError: it is empty, or has ids beyond the vocabulary.
    """
    check_length(model, ids)
    vocab = model.config.vocab_size
    outside = next((token for token in ids if not 0 <= token < vocab), None)
    if outside is not None:
        raise KimiError(f"token ids must be from 0 to {vocab - 1} but the prompt has {outside}")


def check_length(model: KimiLinear, ids: Sequence[int]) -> None:
    """Refuse a prompt that is empty or too long.

    Raises:
        ContextFull: it fills the model's context.
        KimiError: it is empty.
    """
    if not ids:
        raise KimiError("the prompt is empty")
    limit = model.config.model_max_length
    if len(ids) >= limit:
        if model.offload and model.offload.bounds_context:
            raise ContextFull(beyond_budget("the prompt", len(ids), limit))
        raise ContextFull(
            f"the prompt has {len(ids):,} tokens but the model's context (model_max_length) "
            f"holds {limit:,}, the answer included"
        )


def _check_message(number: int, message: Any) -> None:
    where = f"message {number} of the prompt"
    if not isinstance(message, Mapping):
        raise KimiError(f"{where} must be a dict but is {kind(message)}")
    if message.get("role") not in ROLES:
        raise KimiError(
            f"{where} must have a role of {', '.join(ROLES)} but has {message.get('role')!r}"
        )
    content = message.get("content")
    is_empty = content is None and message.get("tool_calls")
    if not (isinstance(content, (str, list)) or is_empty):
        raise KimiError(f"{where} must have content, a string, but has {kind(content)}")


def _token_id(number: int, token: Any) -> int:
    try:
        if isinstance(token, bool):
            raise TypeError
        return index(token)
    except TypeError:
        raise KimiError(
            f"token {number} of the prompt must be an integer but is {kind(token)}"
        ) from None


def kind(value: Any) -> str:
    """The type of a value, for an error."""
    return "None" if value is None else f"of type {type(value).__name__}"


def check_lengths(max_tokens: int, prefill_step: int) -> None:
    """Refuse a `max_tokens` below 1, and a `prefill_step` outside 1 to `PREFILL_STEP_LIMIT`."""
    if max_tokens < 1:
        raise OptionError("max_tokens", f"must be at least 1 but is {max_tokens}")
    check_prefill_step(prefill_step)
