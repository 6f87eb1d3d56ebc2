"""Options that several commands share, spelled and explained once."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.defaults import CONTEXT, MAX_TOKENS, NO_TUNE, PREFILL_STEP
from mlx_kimi.errors import KimiError
from mlx_kimi.generation.generate import check_lengths
from mlx_kimi.generation.sample import Sampling
from mlx_kimi.loading.budget import Budget
from mlx_kimi.model.cache import check_latent_bits
from mlx_kimi.user_files import read_bytes

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def model_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """--model: a folder or a hub name; None is the pocket model."""
    return click.option(
        "--model",
        metavar="FOLDER|HUB-ID",
        show_default="the pocket model inside the package",
        help="A model's folder, or its name on the Hugging Face hub.",
    )(function)


def model_or_pocket(model: str | None) -> str | Path:
    """What a command was given, or the pocket model's folder."""
    return pocket_folder() if model is None else model


def utf8(_: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """A callback for text options: bytes that are not UTF-8 arrive as lone surrogates."""
    for text in (value,) if isinstance(value, str) else value or ():
        check_utf8(f"--{parameter.name}", text)
    return value


def check_utf8(name: str, text: str) -> None:
    """Refuse text that cannot be encoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise KimiError(f"{name} is not UTF-8 at character {error.start}") from None


def read_prompt(prompt: str) -> str:
    """The prompt that a command was given; `-` is stdin."""
    text = _stdin() if prompt == "-" else prompt
    if not text:
        raise KimiError("the prompt is empty")
    return text


def read_text(file: Path) -> str:
    """The text of a file that an option names."""
    try:
        return read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise KimiError(f"{file} is not UTF-8 at byte {error.start}") from None


def _stdin() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise KimiError(
            f"stdin is not UTF-8: byte 0x{byte:02x} at position {error.start}"
        ) from None


def check_options(
    max_tokens: int, prefill_step: int, latent_bits: int | None, **sampling: Any
) -> None:
    """Refuse absurd values of the options below before a model is loaded."""
    check_lengths(max_tokens, prefill_step)
    check_latent_bits(latent_bits)
    Sampling(**sampling)


def _together(*options: Decorator) -> Decorator:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


# Absurd values are refused by Sampling and stream_generate, which the library shares.
sampling_options = _together(
    click.option("--temp", type=float, default=0.0, help="Temperature; 0 is greedy."),
    click.option(
        "--top-p", type=float, default=1.0, help="Keep the likeliest tokens up to this share."
    ),
    click.option("--top-k", type=int, default=0, help="Keep this many tokens; 0 is all."),
    click.option(
        "--min-p", type=float, default=0.0, help="Drop tokens below this share of the likeliest."
    ),
    click.option(
        "--repetition-penalty", type=float, default=1.0, help="Above 1 discourages repeats."
    ),
    click.option("--seed", type=int, show_default="random", help="Makes sampling reproducible."),
)

sessions_option = click.option(
    "--sessions",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="MLX_KIMI_SESSIONS",
    show_envvar=True,
    show_default="the user's data folder",
    help="The folder of saved conversations.",
)


def _no_tune(_: click.Context, __: click.Parameter, value: bool) -> None:
    if value:
        os.environ[NO_TUNE] = "1"


no_tune_option = click.option(
    "--no-tune",
    is_flag=True,
    expose_value=False,
    callback=_no_tune,
    help="Do not try the kernels on this GPU first, as a first load does.",
)

prefill_step_option = click.option(
    "--prefill-step", type=int, default=PREFILL_STEP, help="Prompt tokens read at once."
)


class Bytes(click.ParamType):
    """A number of bytes with its unit, such as 10GB or 1.5 GiB."""

    name = "size"
    units = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        units = {unit.lower(): size for unit, size in self.units.items()}
        found = re.fullmatch(
            r"([0-9]{1,12}(?:\.[0-9]*)?|\.[0-9]+) *([a-z]+)", value.strip().lower()
        )
        if not found or found[2] not in units:
            self.fail(f"{value!r} is no size with a unit ({', '.join(self.units)}), such as 10GB")
        return int(float(found[1]) * units[found[2]])


def budget_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--memory-budget and --context, as `budget`: None without."""
    memory = click.option(
        "--memory-budget",
        type=Bytes(),
        help="Take so much memory at most, such as 10GB; experts are read from the disk as needed.",
    )
    longest = click.option(
        "--context",
        type=click.IntRange(min=1),
        show_default=f"{CONTEXT:,}",
        help="With a memory budget: the longest text to leave room for, in tokens.",
    )

    @wraps(function)
    def with_budget(memory_budget: int | None, context: int | None, **options: Any) -> Any:
        if context is not None and memory_budget is None:
            raise click.UsageError("--context is what --memory-budget leaves room for")
        budget = None
        if memory_budget is not None:
            bits, step = options.get("latent_bits"), options["prefill_step"]
            budget = Budget(memory_budget, context, bits, prefill_step=step)
        return function(budget=budget, **options)

    return memory(longest(with_budget))


latent_bits_option = click.option(
    "--latent-bits",
    type=int,
    show_default="those of the model's dtype",
    help="8 halves the memory that a long context takes.",
)

length_options = _together(
    click.option("--max-tokens", type=int, default=MAX_TOKENS, help="Longest answer, in tokens."),
    prefill_step_option,
    latent_bits_option,
)
