"""The command line: `mlx_kimi COMMAND`. stdout is the answer, stderr everything else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from mlx_kimi import __version__
from mlx_kimi.cli.command import Mistake
from mlx_kimi.cli.grammar import COMMANDS
from mlx_kimi.cli.interrupts import INTERRUPTED
from mlx_kimi.cli.settings import NAMED, read_settings, settings_file
from mlx_kimi.errors import KimiError

BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells report a program that it ended


class Commands(click.Group):
    """Turns errors into one line and an exit code."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)  # in the order of the grammar

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Defaults of your own"):
            formatter.write_text(
                f"--top-p is MLX_KIMI_TOP_P in the environment and top-p in {settings_file()}, "
                f"which {NAMED} moves. What is typed goes before the environment, and that before "
                "the file."
            )

    def main(self, *arguments: Any, **options: Any) -> Any:
        _open_closed_streams()
        return super().main(*arguments, **options)

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        with _usage_in_one_line():
            return super().make_context(*arguments, **options)

    def invoke(self, context: click.Context) -> Any:
        try:
            with _usage_in_one_line():
                context.default_map = read_settings(COMMANDS)
                result = super().invoke(context)
            sys.stdout.flush()
            return result
        except KimiError as error:
            raise click.ClickException(str(error)) from None
        except BrokenPipeError:
            _drop_stdout()
            raise click.exceptions.Exit(BROKEN_PIPE) from None
        except OSError as error:
            _drop_stdout()
            where, why = error.filename or "stdout", error.strerror or error
            raise click.ClickException(f"{where}: {why}") from None
        except RuntimeError as error:
            if "metal" not in str(error).lower():
                raise
            # MLX compiles a kernel when its result is first needed, and the compiler may refuse.
            first = str(error).strip().splitlines()[0]
            hint = "MLX_KIMI_NO_KERNELS=1 in the environment runs without our kernels"
            raise click.ClickException(f"{first}; {hint}") from error
        except KeyboardInterrupt:
            click.echo(err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None


@contextmanager
def _usage_in_one_line() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "mlx_kimi"
        message = error.format_message().rstrip(".")
        has_hint = "Did you mean" in message
        raise Mistake(message if has_hint else f"{message} (see `{command} --help`)") from None


def _open_closed_streams() -> None:
    """Give a program that was started with a closed stream an empty one.

    Else the first file that is opened takes its number, and MLX takes 0 for a failure.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            while os.open(os.devnull, os.O_RDWR) < number:
                pass
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8"))


def _drop_stdout() -> None:
    """What is still buffered cannot be written; without this the interpreter would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@click.group(
    cls=Commands,
    commands=dict(COMMANDS),
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, prog_name="mlx_kimi")
def cli() -> None:
    """Run Kimi Linear on a Mac.

    Without -m, commands use the pocket model that ships inside: a demonstration that can add, sort,
    recall and call tools, trained from scratch for this project.
    """
