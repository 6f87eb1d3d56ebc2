"""`mlx_kimi generate`: one prompt, one streamed answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mlx_kimi.chat.conversation import Conversation
from mlx_kimi.chat.fingerprint import fingerprint
from mlx_kimi.chat.session import read_session
from mlx_kimi.cli import show
from mlx_kimi.cli.given import budget_of, check_options, folder_of, prompt_of, with_defaults
from mlx_kimi.cli.progress import BYTES, work
from mlx_kimi.cli.ranked import load_here, refuse_what_ranks_cannot
from mlx_kimi.generation.answer import Chunk, Stats
from mlx_kimi.generation.generate import Prompt, stream_generate
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.user_files import JSON_BYTES, parsed_json, read_bytes

NO_TOKEN = Stats(  # of an answer that was interrupted before its first
    prompt_tokens=0,
    cached_tokens=0,
    generated_tokens=0,
    time_to_first_token=0.0,
    decode_time=0.0,
    host_time=0.0,
    peak_memory=0,
    seed=0,
)


def run(
    text: str | None,
    files: tuple[Path, ...],
    model: str | None,
    system: str | None,
    prompt_cache: Path | None,
    raw: bool,
    stop: tuple[str, ...],
    json_schema: Path | None,
    as_json: bool,
    split: str | None,
    memory_budget: int | None,
    context: int | None,
    **options: Any,
) -> None:
    prompt = prompt_of(text, files)
    check_options(options)
    schema = _schema(json_schema)
    budget = budget_of(memory_budget, context, options["prefill_step"], options["latent_bits"])
    refuse_what_ranks_cannot(split, budget, options["speculate"])
    if raw and (system or prompt_cache):
        which = "--system" if system else "--prompt-cache"
        raise click.UsageError(f"{which} is part of a chat and --raw has none")
    folder = folder_of(model, budget)
    options = with_defaults(options, folder)
    chunks: list[Chunk] = []
    state: TokenState | None = None
    try:
        network, tokenizer = load_here(folder, budget, split)
        state = TokenState(network, options["latent_bits"], snapshot_every=None)
        conversation = Conversation(system)
        if prompt_cache:
            conversation = _cached(prompt_cache, folder, state, system)
        conversation.say(prompt)
        asked: Prompt = tokenizer.encode(prompt) if raw else conversation.messages
        with work("reading", "tokens") as progress:
            stream = stream_generate(
                network,
                tokenizer,
                asked,
                stop=stop,
                json_schema=schema,
                progress=progress,
                state=state,
                **options,
            )
            chunks.append(next(stream))
        answer = None if as_json else show.AnswerWriter()
        if answer:
            answer.write(chunks[0].text)
        for chunk in stream:
            chunks.append(chunk)
            if answer:
                answer.write(chunk.text)
    except KeyboardInterrupt:
        if as_json:
            click.echo(_json(chunks, "interrupted", state))
        raise
    last = chunks[-1]
    if answer:
        answer.end()
    else:
        click.echo(_json(chunks, last.finish_reason, state))
    if last.finish_reason == "length":
        is_own = last.stats.generated_tokens == options["max_tokens"]
        limit = f"--max-tokens {options['max_tokens']}" if is_own else "the end of the context"
        click.echo(f"the answer is cut at {limit}", err=True)
    click.echo(show.speeds(last.stats), err=True)


def _schema(file: Path | None) -> dict[str, Any] | None:
    """What --json-schema says, before a model is loaded.

    Raises:
        KimiError: the file cannot be read, or what it holds cannot be enforced.
    """
    if file is None:
        return None
    from mlx_kimi.constraints.schema import enforced  # here: it takes 50 ms

    schema = parsed_json(read_bytes(file, JSON_BYTES), file)
    enforced(schema, "json_schema")
    return schema


def _cached(file: Path, folder: Path, state: TokenState, system: str | None) -> Conversation:
    """What `file` holds; `state` has read it if this model has."""
    if system is not None:
        raise click.UsageError("--prompt-cache has its own system message, or none")
    with work("reading the weights, once, to know them again", BYTES) as progress:
        same = fingerprint(folder, state.latent_bits, progress=progress)
    conversation, notes = read_session(file, same, state)
    for note in notes:
        click.echo(f"{file}: {note}", err=True)
    return conversation


def _json(chunks: list[Chunk], finish_reason: str | None, state: TokenState | None) -> str:
    """All of `chunks` in one object; `state` None: the model was not loaded yet."""
    last = chunks[-1].stats if chunks else NO_TOKEN
    stats = show.json_fields(last)
    stats["prompt_tokens_per_second"] = last.prompt_speed
    stats["generation_tokens_per_second"] = last.generation_speed
    return json.dumps(
        {
            "text": "".join(chunk.text for chunk in chunks),
            "token_ids": [chunk.token for chunk in chunks],
            "finish_reason": finish_reason,
            "kernels": sorted(state.computed_by) if state else [],
            **stats,
        },
        ensure_ascii=False,
    )
