"""What options of several commands become: a model's folder, a prompt, a budget."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.cli.fence import fenced
from mlx_kimi.errors import KimiError
from mlx_kimi.generation.generate import check_lengths
from mlx_kimi.generation.sample import Sampling
from mlx_kimi.loading.budget import Budget
from mlx_kimi.model.cache import check_latent_bits
from mlx_kimi.user_files import FILE_BYTES, read_bytes

STDIN = Path("-")


def model_or_pocket(model: str | None) -> str | Path:
    """What a command was given, or the pocket model's folder."""
    return pocket_folder() if model is None else model


def prompt_of(text: str | None, files: Sequence[Path]) -> str:
    """What is asked: TEXT, and before it each file in a fence under its name.

    One file without TEXT is the prompt as it is.

    Raises:
        KimiError: a file cannot be read or is not UTF-8, or all of it is empty.
        click.UsageError: there is neither TEXT nor a file, or stdin is asked for twice.
    """
    if text is None and not files:
        raise click.UsageError("TEXT is missing; -f FILE reads a file, and -f - stdin")
    if text == "-":
        raise click.UsageError("TEXT is - alone; -f - reads stdin")
    if files.count(STDIN) > 1:
        raise click.UsageError("-f - is given twice, and stdin can be read once")
    if text is not None and os.path.isfile(text):
        click.echo(f"TEXT is the words {text!r}; -f {text} reads that file", err=True)
    read = [(_shown(file), _stdin() if file == STDIN else read_text(file)) for file in files]
    if text is None and len(read) == 1:
        prompt = read[0][1]
    else:
        parts = [fenced(name, content) for name, content in read]
        prompt = "\n\n".join(parts if text is None else [*parts, text])
    if not prompt:
        raise KimiError("the prompt is empty")
    return prompt


def _shown(file: Path) -> str:
    return "stdin" if file == STDIN else file.name


def read_text(file: Path) -> str:
    """The text of a file that an option names.

    Raises:
        KimiError: it cannot be read or is not UTF-8.
    """
    return _decoded(read_bytes(file), str(file))


def _stdin() -> str:
    data = sys.stdin.buffer.read(FILE_BYTES + 1)
    if len(data) > FILE_BYTES:
        raise KimiError(f"stdin: may have {FILE_BYTES} bytes, but has more")
    return _decoded(data, "stdin")


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise KimiError(
            f"{name} is not UTF-8: byte 0x{byte:02x} at position {error.start}"
        ) from None


def check_options(
    max_tokens: int, prefill_step: int, latent_bits: int | None, **sampling: Any
) -> None:
    """Refuse absurd values before a model is loaded."""
    check_lengths(max_tokens, prefill_step)
    check_latent_bits(latent_bits)
    Sampling(**sampling)


def budget_of(
    memory_budget: int | None,
    context: int | None,
    prefill_step: int,
    latent_bits: int | None = None,
) -> Budget | None:
    """--memory-budget and --context; None without."""
    if memory_budget is None:
        if context is not None:
            raise click.UsageError("--context is what --memory-budget leaves room for")
        return None
    return Budget(memory_budget, context, latent_bits, prefill_step=prefill_step)
