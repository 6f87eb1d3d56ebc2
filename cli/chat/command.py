"""`mlx_kimi chat`: a conversation that is kept, and can be changed at any point."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mlx_kimi.chat.chat import Chat
from mlx_kimi.chat.fingerprint import fingerprint
from mlx_kimi.chat.session import refuse_longer
from mlx_kimi.chat.sessions import Sessions
from mlx_kimi.chat.tools import load_tools
from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.cli.chat.completion import CommandCompleter
from mlx_kimi.cli.chat.input import LineEditor, PipedLines
from mlx_kimi.cli.chat.loop import Loop, status, toolbar
from mlx_kimi.cli.chat.screen import PlainScreen, TerminalScreen
from mlx_kimi.cli.given import budget_of, check_options, folder_of, with_defaults
from mlx_kimi.cli.progress import BYTES, work
from mlx_kimi.cli.ranked import load_here, refuse_what_ranks_cannot


def run(
    model: str | None,
    system: str | None,
    resume: str | None,
    tools_file: Path | None,
    markdown: bool,
    snapshot_memory: float,
    sessions: Path | None,
    autosave_limit: int,
    split: str | None,
    memory_budget: int | None,
    context: int | None,
    **options: Any,
) -> None:
    check_options(options)
    budget = budget_of(memory_budget, context, options["prefill_step"], options["latent_bits"])
    refuse_what_ranks_cannot(split, budget, options["speculate"])
    if resume is not None:
        if system is not None:
            raise click.UsageError("--system opens a new conversation and --resume goes on")
        resume = resume or Sessions(sessions).latest().name
        Sessions(sessions).existing(resume)  # before a model is loaded
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    latent_bits = options.pop("latent_bits")
    if budget:
        budget = replace(budget, snapshots=int(snapshot_memory * 1e9))
    toolbox = load_tools(tools_file) if tools_file else None
    folder = folder_of(model, budget)
    options = with_defaults(options, folder)
    with work("reading the weights, once, to know them again", BYTES) as progress:
        schemas = toolbox.schemas if toolbox else None
        same = fingerprint(folder, latent_bits, schemas, progress)
    if budget and resume is not None:  # likewise
        longest = budget.tokens(ModelConfig.read(folder))
        refuse_longer(Sessions(sessions).existing(resume), same, longest)
    name = Path(model or folder).name
    network, tokenizer = load_here(folder, budget, split)
    chat = Chat(
        network,
        tokenizer,
        sessions=Sessions(sessions),
        fingerprint=same,
        options=options,
        autosave=is_terminal,
        autosave_limit=autosave_limit,
        toolbox=toolbox,
        latent_bits=latent_bits,
        snapshot_memory=int(snapshot_memory * 1e9),
    )
    loop = _on_terminal(chat, markdown) if is_terminal else Loop(chat, PlainScreen(), PipedLines())
    if is_terminal:
        loop.screen.note(opening_lines(chat, name))
    if resume is not None:
        loop.resume(resume)
    elif system is not None:
        chat.set_system(system)
    loop.run()


def opening_lines(chat: Chat, name: str) -> str:
    """Who answers, and the keys to know."""
    config = chat.model.config
    bits = f"{config.quantization.bits} bits" if config.quantization else "not quantized"
    context = f"{config.model_max_length:,} tokens of context"
    return f"{name} · {bits} · {context}\n/help · Enter sends · Ctrl-C stops · Ctrl-D leaves"


def _on_terminal(chat: Chat, markdown: bool) -> Loop:
    screen = TerminalScreen(lambda stats: status(chat, stats), markdown)
    history = chat.sessions.folder / ".history"  # which is no session's name
    editor = LineEditor(history, CommandCompleter(chat.sessions), lambda: toolbar(loop))
    loop = Loop(chat, screen, editor)
    return loop
