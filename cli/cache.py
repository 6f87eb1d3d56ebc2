"""`mlx_kimi cache`: read a long prompt once, for many questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_kimi.chat.conversation import Conversation
from mlx_kimi.chat.fingerprint import fingerprint
from mlx_kimi.chat.prompt_cache import write_prompt_cache
from mlx_kimi.chat.session import refuse_used
from mlx_kimi.cli.given import folder_of, prompt_of
from mlx_kimi.cli.progress import BYTES, work
from mlx_kimi.cli.ranked import load_here, refuse_what_ranks_cannot
from mlx_kimi.errors import KimiError
from mlx_kimi.units import counted


def run(
    out: Path,
    text: str | None,
    files: tuple[Path, ...],
    model: str | None,
    system: str | None,
    split: str | None,
    **options: Any,
) -> None:
    refuse_what_ranks_cannot(split, None)
    prompt = prompt_of(text, files)
    if out.is_file():
        raise KimiError(f"{out}: is a file, and OUT a new folder; -f {out} reads the file")
    refuse_used(out)
    folder = folder_of(model)
    conversation = Conversation(system)
    conversation.say(prompt)
    with work("reading the weights, once, to know them again", BYTES) as known:
        same = fingerprint(folder, options["latent_bits"], progress=known)
    network, tokenizer = load_here(folder, None, split)
    with work("reading", "tokens") as progress:
        count = write_prompt_cache(
            out,
            network,
            tokenizer,
            conversation,
            same,
            progress=progress,
            **options,
        )
    click.echo(f"{out}: {counted(count, 'token')}", err=True)
