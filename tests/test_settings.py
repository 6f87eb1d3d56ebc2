"""Defaults of the user's own: what is typed, the environment, the file, the model, ours."""

import json
import os
import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from mlx_kimi.cli import generate, settings
from mlx_kimi.cli.grammar import COMMANDS
from mlx_kimi.cli.main import cli
from mlx_kimi.cli.settings import Setting
from tests.processes import ENVIRONMENT, run


class Stop(Exception):
    """A command has its options, and is not to run."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`asked(*arguments, file=..., model=..., **environment)`: the options that `generate` uses.

    file is the text of the settings' file, and model what generation_config.json holds.
    """
    given: list[dict[str, Any]] = []

    def load(*_: object) -> None:
        raise Stop

    def noted(options: dict[str, Any], folder: Path) -> dict[str, Any]:
        given.append(found := whole(options, folder))
        return found

    whole = generate.with_defaults
    monkeypatch.setattr(generate, "load_here", load)
    monkeypatch.setattr(generate, "with_defaults", noted)

    def options(
        *arguments: str, file: str = "", model: object = None, **environment: str
    ) -> dict[str, Any]:
        (tmp_path / "config.toml").write_text(file)
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").touch()
        (folder / "generation_config.json").write_text(json.dumps(model or {}))
        environment = {"MLX_KIMI_CONFIG": str(tmp_path / "config.toml"), **environment}
        arguments = ("generate", "hi", "-m", str(folder), *arguments)
        result = CliRunner().invoke(cli, arguments, env=environment)
        if not isinstance(result.exception, Stop):
            raise AssertionError(result.stderr)
        return given.pop()

    return options


def test_the_nearest_default_counts(asked: Any) -> None:
    file, model = "temp = 0.3", {"temperature": 0.2}
    assert asked()["temp"] == 0
    assert asked(model=model)["temp"] == 0.2
    assert asked(model=model, file=file)["temp"] == 0.3
    assert asked(model=model, file=file, MLX_KIMI_TEMP="0.4")["temp"] == 0.4
    assert asked("--temp", "0.5", model=model, file=file, MLX_KIMI_TEMP="0.4")["temp"] == 0.5
    assert asked("--temp", "0", model=model)["temp"] == 0


def test_a_table_is_for_its_command_alone(asked: Any) -> None:
    file = "temp = 0.3\n[generate]\ntemp = 0.4\n[chat]\ntemp = 0.5"
    assert asked(file=file)["temp"] == 0.4
    assert asked(file="[chat]\ntemp = 0.5")["temp"] == 0


def test_a_models_file_says_what_it_says_in_transformers(asked: Any) -> None:
    model = {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "max_new_tokens": 77,
        "eos_token_id": 5,
    }
    found = asked(model=model)
    expected = {"temp": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.01, "max_tokens": 77}
    assert found.items() >= {**expected, "repetition_penalty": 1.1}.items()
    assert asked(model=model | {"do_sample": False})["temp"] == 0
    assert asked(model={"do_sample": True})["temp"] == 1
    assert asked(model=model | {"do_sample": True})["temp"] == 0.6
    assert asked(model={"max_new_tokens": None})["max_tokens"] == 2048


def with_file(text: str, tmp_path: Path, *arguments: str) -> Result:
    (tmp_path / "config.toml").write_text(text)
    return CliRunner().invoke(
        cli,
        arguments or ("generate", "hi"),
        env={"MLX_KIMI_CONFIG": str(tmp_path / "config.toml")},
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("temp = 'warm'", "temp must be a number but is 'warm'"),
        ("temp = true", "temp must be a number but is True"),
        ("temp = -1", "temp must be 0, or from 0.001 to 1000 but is -1.0"),
        ("max-tokens = 1.5", "max-tokens must be an integer but is 1.5"),
        ("markdown = 1", "markdown must be true or false but is 1"),
        ("max_tokens = 3", "there is no setting max_tokens; max-tokens is one"),
        ("[chat]\ntop_p = 1", "there is no setting chat.top_p; top-p is one"),
        ("[bench]\ntemp = 1", "there is no setting bench.temp"),
        ("[talk]\ntemp = 1", "there is no command 'talk' for the table [talk]"),
        ("json = true", "there is no setting json"),
        ("memory-budget = '3'", "memory-budget: '3' is no size with a unit"),
        ("memory-budget = 3", "memory-budget must be a string but is 3"),
        ("context = 0\nmemory-budget = '1GB'", "context: 0 is not in the range x>=1"),
        ("temp = ", "must be TOML: Invalid value"),
        ("temp = 1\ntemp = 2", "must be TOML: Cannot overwrite a value"),
        ("\x00", "must be TOML: "),
        ("a." * 9000 + "a = 1", ""),
        ("a = " + "[" * 90_000, "must be TOML: "),
        ('"\\u001b[31m" = 1', r"there is no setting \x1b[31m"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    result = with_file(text, tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path / 'config.toml'}: ")
    assert said in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize("damage", ["folder", "pipe", "bytes", "absent"])
def test_what_is_no_file_is_one_line(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "config"
    if damage == "folder":
        file.mkdir()
    elif damage == "pipe":
        os.mkfifo(file)
    elif damage == "bytes":
        file.write_bytes(b"temp = \xff")
    result = CliRunner().invoke(cli, ["info"], env={"MLX_KIMI_CONFIG": str(file)})
    assert result.exit_code == 1 and result.stderr.startswith(f"Error: {file}: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("warm", "Invalid value for MLX_KIMI_TEMP in the environment: 'warm' is not a valid"),
        ("-2", "MLX_KIMI_TEMP in the environment must be 0, or from 0.001 to 1000 but is -2.0"),
    ],
)
def test_the_environment_is_named(value: str, said: str) -> None:
    result = CliRunner().invoke(cli, ["generate", "hi"], env={"MLX_KIMI_TEMP": value})
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": "warm"}, "temperature must be a number but is 'warm'"),
        ({"temperature": True}, "temperature must be a number but is True"),
        ({"temperature": -1}, "temperature must be 0, or from 0.001 to 1000 but is -1"),
        ({"top_k": 1.5}, "top_k must be an integer but is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1 but is 0"),
    ],
)
def test_a_models_damaged_file_is_named(asked: Any, values: object, said: str) -> None:
    with pytest.raises(AssertionError, match=f"generation_config.json: {re.escape(said)}"):
        asked(model=values)


def test_help_says_where_the_file_is(tmp_path: Path) -> None:
    result = with_file("", tmp_path, "--help")
    flat = "".join(result.stdout.split())
    assert result.exit_code == 0 and str(tmp_path / "config.toml") in flat
    result = with_file("broken", tmp_path, "--help")
    assert result.exit_code == 0, "help is there for whoever broke the file"


def test_help_of_a_command_shows_the_files_default(tmp_path: Path) -> None:
    result = with_file("prefill-step = 321", tmp_path, "bench", "--help")
    assert "[default: 321]" in result.stdout


def test_paths_may_begin_with_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "config.toml"
    file.write_text('model = "~/m"\nsessions = "~/s"')
    monkeypatch.setenv("MLX_KIMI_CONFIG", "~/config.toml")
    found = settings.read_settings(COMMANDS)
    assert found["chat"] == {"model": f"{tmp_path}/m", "sessions": f"{tmp_path}/s"}
    assert found["info"] == {"model": f"{tmp_path}/m"} and found["convert"] == {}


def test_what_only_sampling_uses_is_said_to_do_nothing(asked: Any, capfd: Any) -> None:
    """Of what was typed: a file's top-p waits for a temperature."""
    result = CliRunner().invoke(cli, ["generate", "hi", "--seed", "1", "--top-k", "3"])
    assert "--top-k, --seed do nothing at temperature 0; --temp 1 samples\n" in result.stderr
    for options in (["--seed", "1", "--temp", "1"], [], ["--repetition-penalty", "1.1"]):
        result = CliRunner().invoke(cli, ["generate", "hi", *options])
        assert "nothing" not in result.stderr
    result = CliRunner().invoke(cli, ["generate", "hi"], env={"MLX_KIMI_SEED": "1"})
    assert "nothing" not in result.stderr


def test_one_name_is_one_thing_everywhere() -> None:
    """A key of the file means the same, and is of one type, in each command that has it."""
    kinds: dict[str, set[tuple[str, str]]] = {}
    for command in COMMANDS.values():
        for each in command.params:
            assert isinstance(each, click.Argument) or not each.name == "help"
            if isinstance(each, Setting):
                assert each.envvar == f"MLX_KIMI_{each.key.upper().replace('-', '_')}"
                kinds.setdefault(each.key, set()).add((repr(each.type), str(each.help)))
    assert len(kinds) > 10 and all(len(found) == 1 for found in kinds.values())


@pytest.mark.slow
def test_a_process_uses_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("max-tokens = 3")
    environment = {**ENVIRONMENT, "MLX_KIMI_CONFIG": str(file)}
    done = run("generate", "What is KDA?", "--json", env=environment)
    assert json.loads(done.stdout)["generated_tokens"] == 3, done.stderr


def test_the_document_lists_every_setting() -> None:
    text = (Path(__file__).parents[1] / "docs/cli.md").read_text()
    (listed,) = re.findall(r"The settings are (.*?)\. Another", text, re.S)
    keys = {each.key for command in COMMANDS.values() for each in settings.settings_of(command)}
    assert set(re.findall(r"`(.*?)`", listed)) == keys
