"""What a model's generation_config.json asks for where nobody says otherwise."""

from __future__ import annotations

from pathlib import Path

from mlx_kimi.errors import KimiError, OptionError
from mlx_kimi.generation.generate import check_lengths
from mlx_kimi.generation.sample import Sampling, check_number
from mlx_kimi.user_files import read_json_if_there

FILE = "generation_config.json"
KEYS = {  # theirs -> ours
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def model_defaults(folder: Path) -> dict[str, float | int]:
    """Options of `stream_generate`, as far as the file has them.

    As in transformers, `do_sample` false is temperature 0, and true without a temperature is 1.

    Raises:
        KimiError: a value is no number or out of its range.
    """
    file = folder / FILE
    values = read_json_if_there(file)
    found: dict[str, float | int] = {}
    for key, name in KEYS.items():
        value = values.get(key)
        if value is None:
            continue
        found[name] = value
        try:
            _check(name, value)
        except OptionError as error:
            raise KimiError(f"{file}: {key} {error.rule}") from None
    if values.get("do_sample") is False:
        found["temp"] = 0.0
    elif values.get("do_sample") is True:
        found.setdefault("temp", 1.0)
    return found


def _check(name: str, value: float | int) -> None:
    if name == "max_tokens":
        check_number(name, value, int)
        check_lengths(int(value), prefill_step=1)
    else:
        Sampling(**{name: value})  # type: ignore[arg-type]
