"""`mlx_kimi cache`: read a long prompt once, for many questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_kimi.chat.conversation import Conversation
from mlx_kimi.chat.fingerprint import fingerprint
from mlx_kimi.chat.prompt_cache import write_prompt_cache
from mlx_kimi.chat.session import refuse_used
from mlx_kimi.checkpoint.hub import local_folder
from mlx_kimi.cli import show
from mlx_kimi.cli.options import (
    latent_bits_option,
    model_option,
    model_or_pocket,
    no_tune_option,
    prefill_step_option,
    read_prompt,
    utf8,
)
from mlx_kimi.loading.load import load


@click.command("cache")
@click.argument("prompt", callback=utf8)
@click.argument("file", type=click.Path(path_type=Path))
@model_option
@click.option("--system", callback=utf8, help="A system message before the prompt.")
@prefill_step_option
@no_tune_option
@latent_bits_option
def command(prompt: str, file: Path, model: str | None, system: str | None, **options: Any) -> None:
    """Read PROMPT (- is stdin) and store what the model knows then in FILE.

    `generate --prompt-cache FILE -p QUESTION` asks after it, without reading it again. FILE is a
    folder like those of saved conversations: `chat --resume ./FILE` goes on with it, and
    --prompt-cache takes a saved conversation, too.
    """
    refuse_used(file)
    folder = local_folder(model_or_pocket(model))
    conversation = Conversation(system)
    conversation.say(read_prompt(prompt))
    with show.weights_progress() as known:
        same = fingerprint(folder, options["latent_bits"], progress=known)
    network, tokenizer = load(folder)
    with show.prefill_progress() as progress:
        count = write_prompt_cache(
            file,
            network,
            tokenizer,
            conversation,
            same,
            progress=progress,
            **options,
        )
    click.echo(f"{file}: {count:,} tokens", err=True)
