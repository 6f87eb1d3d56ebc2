"""`mlx_kimi chat`: a conversation in a plain terminal, read only once."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Any

import click

from mlx_kimi.cli import show
from mlx_kimi.cli.options import (
    check_options,
    check_utf8,
    length_options,
    model_option,
    model_or_pocket,
    sampling_options,
    utf8,
)
from mlx_kimi.context import Context
from mlx_kimi.errors import KimiError
from mlx_kimi.generate import stream_generate
from mlx_kimi.load import load


@click.command("chat")
@model_option
@click.option("--system", callback=utf8, help="A system message that opens the conversation.")
@length_options
@sampling_options
def command(model: str | None, system: str | None, **options: Any) -> None:
    """Talk with the model. Ctrl-C stops an answer; Ctrl-D, or /exit, ends the chat."""
    check_options(**options)
    if isinstance(sys.stdin, TextIOWrapper):  # what is not UTF-8 is refused by the message
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    network, tokenizer = load(model_or_pocket(model))
    context = Context(network, options["latent_bits"])
    messages = [] if system is None else [{"role": "system", "content": system}]
    while (text := _read_line()) is not None:
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        try:
            check_utf8("the message", text)
            said = _answer(network, tokenizer, messages, context, options)
        except KimiError as error:  # the message cannot be answered; the conversation stays
            click.echo(f"Error: {error}", err=True)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": said})


def _answer(
    network: Any, tokenizer: Any, messages: list[dict[str, str]], context: Context, options: Any
) -> str:
    """Stream one answer and return what was said, whole or up to Ctrl-C."""
    said, stats = "", None
    stream = None
    try:
        with show.prefill_progress() as progress:
            stream = stream_generate(
                network, tokenizer, messages, context=context, progress=progress, **options
            )
            chunk = next(stream)
        while True:
            said, stats = said + chunk.text, chunk.stats
            show.answer(chunk.text)
            if chunk.finish_reason:
                break
            chunk = next(stream)
    except KeyboardInterrupt:
        click.echo(" [stopped]", nl=False, err=True)
    finally:
        if stream is not None:
            stream.close()
    click.echo()
    if stats:
        click.echo(show.speeds(stats), err=True)
    return said


def _read_line() -> str | None:
    """The next line typed; None at the end, at /exit, or at a second Ctrl-C in a row."""
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    for _ in range(2):
        try:
            text = input(prompt)
            return None if text.strip() == "/exit" else text
        except EOFError:
            break
        except KeyboardInterrupt:
            click.echo("\n(Ctrl-C again, Ctrl-D or /exit ends the chat)", err=True)
    click.echo(err=True)
    return None
