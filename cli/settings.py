"""The user's own defaults: options that the environment and a file may set, too.

--top-p is MLX_KIMI_TOP_P in the environment and top-p in the file. What is typed goes before the
environment, that before the file, that before the model's generation_config.json.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mlx_kimi.errors import KimiError
from mlx_kimi.user_files import decoded, is_there, read_bytes, shown

PREFIX = "MLX_KIMI_"
NAMED = "MLX_KIMI_CONFIG"  # names another file in the environment
FILE_BYTES = 1 << 20


class Setting(click.Option):
    """An option with a name in the environment and in the file."""

    def __init__(self, declarations: list[str], **attributes: Any) -> None:
        super().__init__(declarations, **attributes)
        self.envvar = PREFIX + str(self.name).upper()

    def get_error_hint(self, ctx: click.Context | None) -> str:
        return as_given(ctx, str(self.name))[0] if ctx else typed(self)

    @property
    def key(self) -> str:
        """Its name in the file: the option without dashes before it."""
        return typed(self).removeprefix("--")


def typed(parameter: click.Parameter) -> str:
    """A parameter's name as it is typed: --top-p, TEXT."""
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len)
    return parameter.human_readable_name


def as_given(context: click.Context, name: str) -> tuple[str, ParameterSource]:
    """What a user calls a parameter of this command, there where it was set; and where that is."""
    source = context.get_parameter_source(name) or ParameterSource.DEFAULT
    parameter = next((each for each in context.command.params if each.name == name), None)
    if isinstance(parameter, Setting):
        if source is ParameterSource.ENVIRONMENT:
            return f"{parameter.envvar} in the environment", source
        if source is ParameterSource.DEFAULT_MAP:
            return f"{settings_file()}: {parameter.key}", source
    return typed(parameter) if parameter else name, source


def settings_file() -> Path:
    """Where the file is; it may not be there."""
    named = os.environ.get(NAMED)
    if named:
        return Path(named).expanduser()
    from platformdirs import user_config_path  # here: programs that name the file never ask

    return user_config_path("mlx_kimi", appauthor=False) / "config.toml"


def read_settings(commands: Mapping[str, click.Command]) -> dict[str, dict[str, Any]]:
    """What the file says, by command and parameter, as click takes it for a default_map.

    Keys before the first table are for all commands; a table is for the command of its name.

    Raises:
        KimiError: it cannot be read, is no TOML, or has an unknown key or a value of another type.
    """
    file = settings_file()
    if not is_there(file):
        if os.environ.get(NAMED):
            raise KimiError(f"{file}: there is no such file, and {NAMED} names it")
        return {}
    values = _parsed(read_bytes(file, FILE_BYTES), file)
    of_commands = {
        name: {each.key: each for each in settings_of(command)}
        for name, command in commands.items()
    }
    of_all = {key: each for known in of_commands.values() for key, each in known.items()}
    found: dict[str, dict[str, Any]] = {name: {} for name in commands}
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    for key in values.keys() - tables.keys():
        value = _checked(file, key, of_all, values[key])
        for name, known in of_commands.items():
            if key in known:
                found[name][str(known[key].name)] = value
    for name, table in tables.items():
        known = of_commands.get(name, {})
        if not known:
            raise KimiError(f"{file}: there is no command {shown(name)} for the table [{name}]")
        for key, value in table.items():
            value = _checked(file, key, known, value, f"{name}.")
            found[name][str(known[key].name)] = value
    return found


def settings_of(command: click.Command) -> list[Setting]:
    """The options of a command that may be set."""
    return [each for each in command.params if isinstance(each, Setting)]


def _parsed(text: bytes, file: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(decoded(text, file))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise KimiError(f"{file}: must be TOML: {error}") from None


def _checked(
    file: Path, key: str, known: Mapping[str, Setting], value: Any, table: str = ""
) -> Any:
    """A value that the setting takes; of paths and models with the user's folder for ~."""
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        hint = f"; {near[0]} is one" if near else ""
        raise KimiError(f"{file}: there is no setting {table}{shown(key)[1:-1]}{hint}")
    setting = known[key]
    kinds, what = _kinds(setting.type)
    if isinstance(value, bool) != (bool in kinds) or not isinstance(value, kinds):
        raise KimiError(f"{file}: {table}{key} must be {what} but is {shown(value)}")
    try:
        setting.type.convert(value, setting, None)
    except click.BadParameter as error:
        raise KimiError(f"{file}: {table}{key}: {error.message}") from None
    is_path = isinstance(setting.type, click.Path) or setting.key == "model"
    return os.path.expanduser(str(value)) if is_path else value


def _kinds(of: click.ParamType) -> tuple[tuple[type, ...], str]:
    """The types of TOML that an option takes, and their name."""
    if isinstance(of, click.types.BoolParamType):
        return (bool,), "true or false"
    if isinstance(of, click.types.IntParamType):
        return (int,), "an integer"
    if isinstance(of, click.types.FloatParamType):
        return (int, float), "a number"
    return (str,), "a string"
