"""The options that several commands share, each spelled and explained once. Imports little."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from mlx_kimi.cli.settings import Setting, typed
from mlx_kimi.defaults import AUTOSAVE_LIMIT, CONTEXT, MAX_TOKENS, NO_TUNE, PREFILL_STEP
from mlx_kimi.errors import KimiError
from mlx_kimi.units import human_size

OF_MODEL = "the model's, else"


class ModelName(click.ParamType):
    """A model's folder, or its name on the hub. Folders complete."""

    name = "folder|hub-id"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> str:
        return os.path.expanduser(value)

    def shell_complete(
        self, context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


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


def utf8(_: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """A callback for text: bytes that are not UTF-8 arrive as lone surrogates."""
    for text in (value,) if isinstance(value, str) else value or ():
        check_utf8(typed(parameter), text)
    return value


def check_utf8(name: str, text: str) -> None:
    """Refuse text that cannot be encoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise KimiError(f"{name} is not UTF-8 at character {error.start}") from None


def _no_tune(_: click.Context, __: click.Parameter, value: bool) -> None:
    if value:
        os.environ[NO_TUNE] = "1"


MODEL = Setting(
    ["-m", "--model"],
    type=ModelName(),
    show_default="the pocket model inside the package",
    help="A model's folder, or its name on the Hugging Face hub.",
)
TEXT = click.Argument(["text"], required=False, callback=utf8)
FILES = click.Option(
    ["-f", "--file", "files"],
    multiple=True,
    type=click.Path(allow_dash=True, path_type=Path),
    help="A text file that goes before TEXT; - is stdin; may repeat.",
)
SYSTEM = click.Option(["--system"], callback=utf8, help="A system message before the prompt.")

# Without a default of their own: that of the model's generation_config.json goes before ours, which
# is that of `sample.Sampling`. Absurd values are refused there.
SAMPLING = [
    Setting(
        ["--temp"],
        type=float,
        show_default=f"{OF_MODEL} 0",
        help="Temperature; 0 takes the likeliest token.",
    ),
    Setting(
        ["--top-p"],
        type=float,
        show_default=f"{OF_MODEL} 1",
        help="Keep the likeliest tokens up to this share.",
    ),
    Setting(
        ["--top-k"],
        type=int,
        show_default=f"{OF_MODEL} 0",
        help="Keep this many tokens; 0 is all.",
    ),
    Setting(
        ["--min-p"],
        type=float,
        show_default=f"{OF_MODEL} 0",
        help="Drop tokens below this share of the likeliest.",
    ),
    Setting(
        ["--repetition-penalty"],
        type=float,
        show_default=f"{OF_MODEL} 1",
        help="Above 1 discourages repeats.",
    ),
    Setting(
        ["--seed"],
        type=int,
        show_default="random",
        help="Makes sampling reproducible; nothing at temperature 0.",
    ),
]

SESSIONS = Setting(
    ["--sessions"],
    type=click.Path(path_type=Path),
    show_default="the user's data folder",
    help="The folder of saved conversations.",
)
AUTOSAVE = Setting(
    ["--autosave-limit"],
    type=Bytes(),
    default=AUTOSAVE_LIMIT,
    show_default=human_size(AUTOSAVE_LIMIT),
    help="What sessions that nobody named may take of the disk; then the oldest go.",
)
NO_TUNE_FIRST = click.Option(
    ["--no-tune"],
    is_flag=True,
    expose_value=False,
    callback=_no_tune,
    help="Do not try the kernels on this GPU first, as a first load does.",
)
PREFILL = Setting(
    ["--prefill-step"], type=int, default=PREFILL_STEP, help="Prompt tokens read at once."
)
LATENT_BITS = Setting(
    ["--latent-bits"],
    type=int,
    show_default="those of the model's dtype",
    help="8 halves the memory that a long context takes.",
)
LONGEST = Setting(
    ["--max-tokens"],
    type=int,
    show_default=f"{OF_MODEL} {MAX_TOKENS}",
    help="Longest answer, in tokens.",
)
SPECULATE = Setting(
    ["--speculate"],
    type=click.Choice(["off", "auto"]),
    default="off",
    help="auto: read several tokens in a step where the text repeats itself.",
)
LENGTHS = [
    LONGEST,
    PREFILL,
    LATENT_BITS,
    SPECULATE,
]
SPLIT = Setting(
    ["--split"],
    metavar="layers[=N,N,...]|heads",
    help="With mlx.launch: the layers of each rank, rank 0 first, by their memory without numbers; "
    "or heads of all layers.",
)
BUDGET = [
    Setting(
        ["--memory-budget"],
        type=Bytes(),
        help="Take so much memory at most, such as 10GB; experts are read from the disk as needed.",
    ),
    Setting(
        ["--context"],
        type=click.IntRange(min=1),
        show_default=f"{CONTEXT:,}",
        help="With a memory budget: the longest text to leave room for, in tokens.",
    ),
]
