"""What options of several commands become: a model's folder, a prompt, a budget."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.cli.fence import fenced
from mlx_kimi.cli.settings import typed
from mlx_kimi.defaults import MAX_TOKENS, PREFILL_STEP
from mlx_kimi.errors import KimiError
from mlx_kimi.generation.generate import check_lengths
from mlx_kimi.generation.model_defaults import model_defaults
from mlx_kimi.generation.sample import Sampling
from mlx_kimi.loading.budget import Budget
from mlx_kimi.loading.fetch import fetched
from mlx_kimi.loading.load import check_headers
from mlx_kimi.model.cache import check_latent_bits
from mlx_kimi.ranks.launched import Launched
from mlx_kimi.user_files import FILE_BYTES, decoded, read_bytes

STDIN = Path("-")
ONLY_SAMPLING = ("top_p", "top_k", "min_p", "seed")  # of no use at temperature 0


def model_or_pocket(model: str | None) -> str | Path:
    """What a command was given, or the pocket model's folder."""
    return pocket_folder() if model is None else model


def folder_of(model: str | None, budget: Budget | None = None, fits: bool = True) -> Path:
    """The folder of a whole model. Of one on the hub all is checked that small files tell, then its
    size is said, and then its weights are downloaded.

    fits: whether it must fit into this machine's memory; on several ranks it need not.

    Raises:
        KimiError: there is no such model, or it does not load here.
    """
    check = partial(
        check_headers, budget=budget, may_be_too_large=not fits or bool(Launched.here())
    )
    return fetched(model_or_pocket(model), check, say=lambda line: click.echo(line, err=True))


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
    return decoded(read_bytes(file), file)


def _stdin() -> str:
    data = sys.stdin.buffer.read(FILE_BYTES + 1)
    if len(data) > FILE_BYTES:
        raise KimiError(f"stdin: may have {FILE_BYTES} bytes, but has more")
    return decoded(data, "stdin")


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse absurd values of LENGTHS and SAMPLING before a model is loaded."""
    given = {name: value for name, value in options.items() if value is not None}
    check_lengths(given.pop("max_tokens", MAX_TOKENS), given.pop("prefill_step", PREFILL_STEP))
    check_latent_bits(given.pop("latent_bits", None))
    given.pop("speculate", None)
    Sampling(**given)


def with_defaults(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """These options, and for those that are None what the model in `folder` asks for, or we do.

    What was typed and does nothing at temperature 0 is named on stderr.

    Raises:
        KimiError: the folder's generation_config.json is out of range.
    """
    ours = {"max_tokens": MAX_TOKENS, **asdict(Sampling()), **model_defaults(folder)}
    found = {n: ours.get(n) if value is None else value for n, value in options.items()}
    context = click.get_current_context()
    idle = [
        typed(each)
        for each in context.command.params
        if each.name in ONLY_SAMPLING
        and context.get_parameter_source(str(each.name)) is ParameterSource.COMMANDLINE
    ]
    if idle and found["temp"] == 0:
        does = "does" if len(idle) == 1 else "do"
        click.echo(f"{', '.join(idle)} {does} nothing at temperature 0; --temp 1 samples", err=True)
    return found


def budget_of(
    memory_budget: int | None,
    context: int | None,
    prefill_step: int = PREFILL_STEP,
    latent_bits: int | None = None,
) -> Budget | None:
    """--memory-budget and --context; None without."""
    if memory_budget is None:
        if context is not None:
            raise click.UsageError("--context is what --memory-budget leaves room for")
        return None
    return Budget(memory_budget, context, latent_bits, prefill_step=prefill_step)
