"""`mlx_kimi generate`: one prompt, one streamed answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mlx_kimi.chat.conversation import Conversation
from mlx_kimi.chat.fingerprint import fingerprint
from mlx_kimi.chat.session import read_session
from mlx_kimi.checkpoint.hub import local_folder
from mlx_kimi.cli import show
from mlx_kimi.cli.options import (
    budget_options,
    check_options,
    length_options,
    model_option,
    model_or_pocket,
    no_tune_option,
    read_prompt,
    sampling_options,
    utf8,
)
from mlx_kimi.generation.answer import Chunk
from mlx_kimi.generation.generate import Prompt, stream_generate
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.loading.budget import Budget
from mlx_kimi.loading.load import load


@click.command("generate")
@model_option
@click.option(
    "--prompt", "-p", required=True, callback=utf8, help="What to ask; - reads it from stdin."
)
@click.option("--system", callback=utf8, help="A system message before the prompt.")
@click.option(
    "--prompt-cache",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FILE",
    help="Ask after a prompt that `mlx_kimi cache` read, or a saved conversation.",
)
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without a chat template.")
@click.option(
    "--stop",
    multiple=True,
    callback=utf8,
    metavar="TEXT",
    help="End the answer before TEXT; may repeat.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead.")
@length_options
@budget_options
@no_tune_option
@sampling_options
def command(
    model: str | None,
    prompt: str,
    system: str | None,
    prompt_cache: Path | None,
    raw: bool,
    stop: tuple[str, ...],
    as_json: bool,
    budget: Budget | None,
    **options: Any,
) -> None:
    """Stream the answer to one prompt."""
    text = read_prompt(prompt)
    check_options(**options)
    if raw and (system or prompt_cache):
        which = "--system" if system else "--prompt-cache"
        raise click.UsageError(f"{which} is part of a chat and --raw has none")
    folder = local_folder(model_or_pocket(model))
    network, tokenizer = load(folder, budget)
    state = TokenState(network, options["latent_bits"], snapshot_every=None)
    conversation = Conversation(system)
    if prompt_cache:
        conversation = _cached(prompt_cache, folder, state, system)
    conversation.say(text)
    asked: Prompt = tokenizer.encode(text) if raw else conversation.messages

    chunks: list[Chunk] = []
    with show.prefill_progress() as progress:
        stream = stream_generate(
            network, tokenizer, asked, stop=stop, progress=progress, state=state, **options
        )
        chunks.append(next(stream))
    if not as_json:
        show.answer(chunks[0].text)
    for chunk in stream:
        chunks.append(chunk)
        if not as_json:
            show.answer(chunk.text)
    click.echo(_json(chunks, state) if as_json else "")
    click.echo(show.speeds(chunks[-1].stats), err=True)


def _cached(file: Path, folder: Path, state: TokenState, system: str | None) -> Conversation:
    """What `file` holds; `state` has read it if this model has."""
    if system is not None:
        raise click.UsageError("--prompt-cache has its own system message, or none")
    with show.weights_progress() as progress:
        same = fingerprint(folder, state.latent_bits, progress=progress)
    conversation, notes = read_session(file, same, state)
    for note in notes:
        click.echo(f"{file}: {note}", err=True)
    return conversation


def _json(chunks: list[Chunk], state: TokenState) -> str:
    last = chunks[-1]
    stats = show.json_fields(last.stats)
    stats["prompt_tokens_per_second"] = last.stats.prompt_speed
    stats["generation_tokens_per_second"] = last.stats.generation_speed
    return json.dumps(
        {
            "text": "".join(chunk.text for chunk in chunks),
            "token_ids": [chunk.token for chunk in chunks],
            "finish_reason": last.finish_reason,
            "kernels": sorted(state.computed_by),
            **stats,
        },
        ensure_ascii=False,
    )
