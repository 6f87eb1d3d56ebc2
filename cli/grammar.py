"""Every command: its arguments, its options and its help. What it does is in a file of its own.

A model is given with -m, text as TEXT or with -f, and what is made as OUT. This file imports no
room that computes, so that --help and a shell's completion answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_kimi.checkpoint.config import QUANTIZATION_MODES
from mlx_kimi.cli.agents import AGENTS
from mlx_kimi.cli.command import Command, Either
from mlx_kimi.cli.options import (
    AUTOSAVE,
    BUDGET,
    FILES,
    LATENT_BITS,
    LENGTHS,
    LONGEST,
    MODEL,
    NO_TUNE_FIRST,
    PREFILL,
    SAMPLING,
    SESSIONS,
    SPECULATE,
    SPLIT,
    SYSTEM,
    TEXT,
    Bytes,
    ModelName,
    utf8,
)
from mlx_kimi.cli.settings import Setting
from mlx_kimi.convert.quantize import DTYPES, RECIPES
from mlx_kimi.defaults import (
    CACHE_DISK,
    EVALUATED_TOKENS,
    PREFILL_STEP_LIMIT,
    REPORTED_TOKENS,
    SNAPSHOT_MEMORY,
    WINDOW,
)
from mlx_kimi.units import human_size

FILE = click.Path(path_type=Path)
AS_JSON = click.Option(["--json", "as_json"], is_flag=True, help="List them as JSON.")
LATEST = ""  # what --resume is without a name
_AFFINE_GROUPS, _AFFINE_BITS = QUANTIZATION_MODES["affine"]
_RECIPES = "\n\n".join(f"  {name}: {recipe.reason}." for name, recipe in RECIPES.items())


def _choices(values: tuple[int, ...]) -> str:
    return "[" + "|".join(map(str, values)) + "]"


def _flag(name: str, help: str) -> click.Option:
    return click.Option([name], is_flag=True, help=help)


GENERATE = Command(
    "generate",
    [
        TEXT,
        FILES,
        MODEL,
        SYSTEM,
        click.Option(
            ["--prompt-cache"],
            type=FILE,
            metavar="FOLDER",
            help="Ask after a prompt that `mlx_kimi cache` read, or a saved conversation.",
        ),
        _flag("--raw", "Continue the prompt as it is, without a chat template."),
        click.Option(
            ["--stop"],
            multiple=True,
            callback=utf8,
            metavar="TEXT",
            help="End the answer before TEXT; may repeat.",
        ),
        click.Option(
            ["--json-schema"],
            type=FILE,
            metavar="FILE.json",
            help="The answer is JSON that obeys this schema. The model is not told of it.",
        ),
        click.Option(
            ["--json", "as_json"], is_flag=True, help="Print one JSON object at the end instead."
        ),
        *LENGTHS,
        SPLIT,
        *BUDGET,
        NO_TUNE_FIRST,
        *SAMPLING,
    ],
    """Stream the answer to one prompt.

    The prompt is TEXT, and before it each -f FILE under its name. One FILE without TEXT is the
    prompt as it is.
    """,
)

CHAT = Command(
    "chat",
    [
        MODEL,
        click.Option(
            ["--system"], callback=utf8, help="A system message that opens the conversation."
        ),
        click.Option(
            ["--resume"],
            is_flag=False,
            flag_value=LATEST,
            metavar="[NAME]",
            callback=utf8,
            help="Go on with a session; the latest without a name.",
        ),
        click.Option(
            ["--tools", "tools_file"],
            type=FILE,
            metavar="FILE.py",
            help="Offer the file's documented functions to the model; each call asks you first.",
        ),
        Setting(["--markdown/--no-markdown"], default=True, help="Format answers on a terminal."),
        Setting(
            ["--snapshot-memory"],
            type=click.FloatRange(min=0),
            default=SNAPSHOT_MEMORY / 1e9,
            show_default="1.07",
            help="GB that the states to go back to may take.",
        ),
        SESSIONS,
        AUTOSAVE,
        *LENGTHS,
        SPLIT,
        *BUDGET,
        NO_TUNE_FIRST,
        *SAMPLING,
    ],
    """Talk with the model. /help lists the commands; Ctrl-C stops an answer; Ctrl-D ends.

    In a pipe every line is a message, answers go to stdout, and nothing is kept without /save NAME.
    """,
    module="chat.command",
)

API_KEY = Setting(
    ["--api-key"],
    metavar="KEY",
    callback=utf8,
    help="What requests must show. Others can read a command line: MLX_KIMI_API_KEY is the same.",
)
SERVE = Command(
    "serve",
    [
        MODEL,
        Setting(
            ["--host"],
            default="127.0.0.1",
            help="The address to listen on; another than this machine's own needs --api-key.",
        ),
        Setting(
            ["--port"],
            type=click.IntRange(0, 65535),
            default=8080,
            help="The port to listen on; 0 is any that is free.",
        ),
        API_KEY,
        click.Option(
            ["--allow-origin"],
            multiple=True,
            metavar="URL",
            callback=utf8,
            help="A web page that may ask, such as http://localhost:3000; may repeat.",
        ),
        click.Option(
            ["--allow-host"],
            multiple=True,
            metavar="NAME",
            callback=utf8,
            help="A further name of this machine that requests may use; may repeat.",
        ),
        _flag("--log-prompts", "Also log what is asked and answered."),
        Setting(
            ["--rows"],
            type=click.IntRange(1, 256),
            default=16,
            help="Requests that are read or answered at a time; one with a memory budget, or on "
            "ranks.",
        ),
        Setting(
            ["--cache-memory"],
            type=Bytes(),
            show_default="a quarter of what is free, 8 GiB at most; 1 GiB with a memory budget",
            help="What states of prompts may take, so that they are not read again.",
        ),
        click.Option(
            ["--prompt-cache", "prompt_caches"],
            type=FILE,
            multiple=True,
            metavar="FOLDER",
            help="What `mlx_kimi cache` made, or a session: requests that begin so go on from it; "
            "may repeat.",
        ),
        Setting(
            ["--cache-disk"],
            type=Bytes(),
            default=CACHE_DISK,
            show_default=human_size(CACHE_DISK),
            help="What states of prompts may take of the disk, where they outlive the server; 0GB "
            "keeps none there.",
        ),
        Setting(
            ["--prefill-slice"],
            type=click.IntRange(1, PREFILL_STEP_LIMIT),
            show_default="measured at the start",
            help="Prompt tokens read at once, between tokens of running answers.",
        ),
        LONGEST,
        LATENT_BITS,
        SPECULATE,
        SPLIT,
        *BUDGET,
        NO_TUNE_FIRST,
        *SAMPLING,
    ],
    """Serve the model to other programs, as OpenAI's and Anthropic's APIs.

    Requests that say nothing of sampling and lengths get what is given here. The log goes to
    stderr, a line of JSON a request.
    """,
)

LAUNCH = Command(
    "launch",
    [
        click.Argument(["agent"], type=click.Choice(list(AGENTS))),
        Setting(
            ["--url"],
            default="http://127.0.0.1:8080",
            callback=utf8,
            help="Where `serve` says that it listens.",
        ),
        API_KEY,
        _flag("--write", "Make the file, where none is; else it is printed."),
    ],
    """Print or write what AGENT must know to use a running `serve`.""",
)

NAME = click.Argument(["name"], callback=utf8)
RENAME = Command(
    "rename",
    [NAME, click.Argument(["new"], callback=utf8)],
    """Give a session the name NEW.""",
    module="sessions",
    function="rename",
)
REMOVE = Command(
    "rm",
    [
        click.Argument(["names"], nargs=-1, callback=utf8, metavar="NAME..."),
        _flag("--autosaved", "Remove all that nobody named."),
    ],
    """Remove sessions: their text and their states.""",
    module="sessions",
    function="remove",
)
EXPORT = Command(
    "export",
    [
        NAME,
        click.Option(["--format", "form"], type=click.Choice(["md", "json"]), default="md"),
        click.Option(
            ["-o", "--output"],
            type=FILE,
            metavar="FILE",
            show_default="stdout",
            help="A new file to write.",
        ),
    ],
    """Print the whole text of a session, as markdown or JSON.""",
    module="sessions",
    function="export",
)
LIST = Command(
    "sessions",
    [
        SESSIONS,
        AUTOSAVE,
        AS_JSON,
    ],
    """List saved conversations, the latest first; rename, remove or export one.

    Chats on a terminal are saved by themselves. Those that nobody named may take --autosave-limit
    of the disk: then the oldest of them go, never one that has a name, is open, or is the latest.
    """,
)


@click.pass_context
def _sessions(context: click.Context, /, **given: Any) -> None:
    context.obj = given["sessions"]  # for the commands below it
    if context.invoked_subcommand is None:
        LIST._run(**given)


KEPT = click.Group(
    "sessions",
    {str(each.name): each for each in (RENAME, REMOVE, EXPORT)},
    params=LIST.params,
    callback=_sessions,
    help=LIST.help,
    invoke_without_command=True,
)

CACHE_LIST = Command(
    "list",
    [AS_JSON],
    """List the models whose states `serve` stores, with their sizes.""",
    module="stores",
    function="list_stores",
)
CACHE_WIPE = Command(
    "wipe",
    [click.Argument(["models"], nargs=-1, callback=utf8)],
    """Delete the states that `serve` stores, of MODELS as `cache list` names them, or of all.

    What a server that runs keeps is refused.
    """,
    module="stores",
    function="wipe_stores",
)
CACHE = Command(
    "cache",
    [
        click.Argument(["out"], type=FILE),
        TEXT,
        FILES,
        MODEL,
        SYSTEM,
        PREFILL,
        NO_TUNE_FIRST,
        LATENT_BITS,
        SPLIT,
    ],
    """Read a long prompt once, for many questions, and store what the model knows then in OUT.

    `cache list` and `cache wipe` are about what `serve` stores by itself; ./list is an OUT.

    The prompt is TEXT and -f FILE, as of `generate`. `generate --prompt-cache OUT QUESTION` asks
    after it, without reading it again. OUT is a folder like those of saved conversations: `chat
    --resume ./OUT` goes on with it, `serve --prompt-cache OUT` lets requests do so, and
    --prompt-cache takes a saved conversation, too.
    """,
)

STORED = Either(CACHE, {str(each.name): each for each in (CACHE_LIST, CACHE_WIPE)})

CONVERT = Command(
    "convert",
    [
        click.Argument(["out"], type=FILE),
        click.Option(
            ["-m", "--model", "source"],
            type=ModelName(),
            required=True,
            help="What is converted: a model's folder, or its name on the Hugging Face hub.",
        ),
        click.Option(
            ["--bits"],
            type=int,
            metavar=_choices(_AFFINE_BITS),
            show_default="4; 6 with a recipe for experts",
            help="Bits of a weight.",
        ),
        click.Option(
            ["--group-size"],
            type=int,
            metavar=_choices(_AFFINE_GROUPS),
            show_default="64",
            help="Weights that share a scale.",
        ),
        click.Option(
            ["--mode"],
            type=click.Choice(list(QUANTIZATION_MODES)),
            show_default="affine",
            help="Form of the numbers; all but affine fix bits and group size.",
        ),
        click.Option(
            ["--recipe"],
            type=click.Choice(list(RECIPES)),
            show_default="default",
            help="Other bits for some tensors, see below.",
        ),
        _flag("--no-quantize", "Change the layout only."),
        click.Option(
            ["--dtype"],
            type=click.Choice(list(DTYPES)),
            show_default="as in the model",
            help="Of scales and of what is not quantized.",
        ),
        _flag(
            "--delete-source-shards",
            "Of a name on the hub, download one shard at a time and delete it when it is "
            "converted.",
        ),
        _flag(
            "--report",
            "Then compare OUT with the model, layer by layer: a table, and OUT/quality.json.",
        ),
        click.Option(
            ["--report-text"],
            type=FILE,
            metavar="FILE",
            show_default="a sample",
            help=f"The text that --report lets both predict; its first {REPORTED_TOKENS} tokens.",
        ),
    ],
    """Convert a model to the new folder OUT, of a quarter of its size.

    OUT is in the MLX layout, which mlx-lm reads too. The model must not be quantized: published, or
    what `convert --no-quantize` or mlx-lm wrote. What is interrupted is kept in OUT.partial, and
    the same command goes on from there.
    """,
    epilog=f"Recipes, with the size of the 48B:\n\n{_RECIPES}",
)

CHECK = Command(
    "check",
    [
        MODEL,
        NO_TUNE_FIRST,
        _flag(
            "--report",
            "Also print what to paste into an issue: this machine, and each kernel alone.",
        ),
    ],
    """Check a model: its tensors, tokenizer, chat template, MLX's operations, kernels and answers.

    Exit code 1 if anything is wrong.
    """,
)

TUNE = Command(
    "tune",
    [
        MODEL,
        click.Option(
            ["--seconds"],
            type=click.FloatRange(min=1),
            default=120.0,
            help="From then on nothing more is measured.",
        ),
    ],
    """Try each kernel on this GPU, and keep what is right and fastest for such a model.

    Each is compiled, compared with plain products and timed beside MLX's operations, with random
    weights of the model's shapes, in a process of its own. The first load of a model does it by
    itself, and measures no more after 30 seconds.
    """,
)

INFO = Command(
    "info",
    [
        MODEL,
        _flag("--kernels", "Which kernels run on this machine, and why."),
        click.Option(
            ["--context"],
            type=click.IntRange(min=1),
            metavar="TOKENS",
            help="What a context of so many tokens takes.",
        ),
        LATENT_BITS,
    ],
    """Say what a model is made of, and whether it fits this machine. Reads headers, no weights.""",
)

RANKS = Command(
    "ranks",
    [
        MODEL,
        click.Option(
            ["--memory"],
            metavar="SIZE,SIZE,...",
            callback=utf8,
            help="The memory of each Mac, rank 0 first, such as 24GB,32GB.",
        ),
        click.Option(
            ["--hostfile"],
            type=FILE,
            metavar="FILE.json",
            help="The machines, as mlx.launch has them.",
        ),
        SPLIT,
        LATENT_BITS,
    ],
    """Say what each of several machines would hold, whether that fits, and how to start them.

    Reads headers, no weights. Without --memory each is taken to be like this machine.
    """,
)

EVALUATE = Command(
    "evaluate",
    [
        click.Option(
            ["-f", "--file"],
            required=True,
            type=click.Path(allow_dash=True, path_type=Path),
            help="A text file to predict; - is stdin.",
        ),
        MODEL,
        NO_TUNE_FIRST,
        click.Option(
            ["--against"],
            type=ModelName(),
            help="The model to compare with, such as the unquantized one. It is read first, and "
            "let go.",
        ),
        click.Option(["--tokens"], type=int, default=EVALUATED_TOKENS, help="Tokens of the text."),
        click.Option(["--window"], type=int, default=WINDOW, help="Tokens that are read together."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object."),
    ],
    """Measure how well a model predicts a text; lower is better.

    With --against, also the KL divergence from that model's predictions to this one's.
    """,
)

BENCH = Command(
    "bench",
    [
        MODEL,
        click.Option(
            ["--contexts"],
            default="512,2048,8192",
            metavar="N,N,...",
            help="Context lengths in tokens.",
        ),
        click.Option(["--tokens"], type=int, default=128, help="Tokens of an answer."),
        click.Option(["--repeats"], type=int, default=3, help="Answers at each context."),
        PREFILL,
        SPECULATE,
        SPLIT,
        *BUDGET,
        NO_TUNE_FIRST,
        click.Option(
            ["--json", "json_file"],
            type=click.Path(allow_dash=True, path_type=Path),
            help="Write all there is as JSON; - is stdout.",
        ),
        click.Option(
            ["--plot", "plot_file"], type=FILE, help="Draw speeds by context, as .png or .svg."
        ),
    ],
    """Measure speeds and memory by context length.

    A pseudo-random text is read up to each context length, and answered there.
    """,
)

PULL = Command(
    "pull",
    [NAME],
    """Download a model of the Hugging Face hub, and print the folder that it is in.

    Its small files and its weights' headers are checked first, and the disk; a download that was
    interrupted goes on. What is too large for this machine's memory can be converted.
    """,
    module="models",
    function="pull",
)
MODELS = Command(
    "list",
    [AS_JSON],
    """List the models on this machine: those of the hub that were downloaded, and those that
    `convert` made.""",
    module="models",
    function="list_models",
)
REMOVE_MODELS = Command(
    "rm",
    [
        click.Argument(["names"], nargs=-1, required=True, callback=utf8),
        _flag("--yes", "Ask nothing."),
    ],
    """Remove models, by the names that `list` gives them.

    Of a folder that `convert` made, the files that it made and nobody has changed are removed.
    """,
    module="models",
    function="remove",
)

COMMANDS: dict[str, click.Command] = {
    str(command.name): command
    for command in (
        GENERATE,
        CHAT,
        SERVE,
        LAUNCH,
        KEPT,
        STORED,
        PULL,
        MODELS,
        REMOVE_MODELS,
        CONVERT,
        CHECK,
        TUNE,
        INFO,
        RANKS,
        EVALUATE,
        BENCH,
    )
}
