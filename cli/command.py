"""A command: its module is imported when it runs, and options are named as they were given."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click
from click.core import ParameterSource

from mlx_kimi import backend
from mlx_kimi.cli.interrupts import raise_again
from mlx_kimi.cli.options import FILES, MODEL
from mlx_kimi.cli.settings import as_given
from mlx_kimi.errors import OptionError
from mlx_kimi.ranks.launched import Launched

USAGE = 2  # the exit code of a command line that is wrong


class Mistake(click.ClickException):
    """One line about a command line that is wrong."""

    exit_code = USAGE


class Either(click.Group):
    """A command, and others below it: those are meant where their name comes first."""

    def __init__(self, own: click.Command, below: dict[str, click.Command]) -> None:
        super().__init__(own.name, below, params=own.params, help=own.help)
        self._own = own

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        if args and args[0] in self.commands:
            below = click.Group(self.name, self.commands, help=self.help)
            return below.make_context(info_name, args, parent, **extra)
        return self._own.make_context(info_name, args, parent, **extra)


class Command(click.Command):
    """Runs a function of its module, which is imported then and not before."""

    def __init__(
        self,
        name: str,
        params: Sequence[click.Parameter],
        help: str,
        module: str | None = None,
        epilog: str | None = None,
        function: str = "run",
    ) -> None:
        self.module, self.function = f"mlx_kimi.cli.{module or name}", function
        super().__init__(
            name,
            {"allow_extra_args": True},
            self._run,
            list(params),
            help,
            epilog,
        )

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        left = super().parse_args(context, arguments)
        if left and not context.resilient_parsing:
            takes = "" if MODEL not in self.params else "; a model is given with -m"
            if FILES in self.params:
                takes = "; TEXT of several words needs quotes, a file -f and a model -m"
            context.fail(f"unexpected argument {left[0]!r}{takes}")
        return left

    def _follow_if_told(self, given: dict[str, Any]) -> None:
        """Of several ranks, those but the first end here: they read nothing and print nothing."""
        launched = Launched.here()
        if launched is None:
            return
        if "split" not in given:
            raise click.UsageError(
                f"{self.name} runs in one process, but mlx.launch has started {launched.size}"
            )
        if launched.rank:
            from mlx_kimi.cli.ranked import follow_with  # here: it imports all that computes

            follow_with(launched, given["model"])

    def _run(self, **given: Any) -> None:
        if problem := backend.missing():
            raise click.ClickException(problem)
        self._follow_if_told(given)
        module = import_module(self.module)
        raise_again()
        try:
            getattr(module, self.function)(**given)
        except OptionError as error:
            name, source = as_given(click.get_current_context(), error.name)
            is_files = source is ParameterSource.DEFAULT_MAP
            kind = click.ClickException if is_files else Mistake
            raise kind(f"{name} {error.rule}") from None
