"""Typed look-ups in a JSON object: what is absent, absurd or contradictory is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_kimi.errors import KimiError
from mlx_kimi.user_files import is_there, read_json_if_there

Json = Mapping[str, Any]

# transformers 5 writes the right-hand spellings beside or instead of the published ones.
ALIASES = {
    "num_experts_per_token": "num_experts_per_tok",
    "num_expert_group": "n_group",
    "num_experts": "num_local_experts",
    "num_shared_experts": "n_shared_experts",
    "moe_renormalize": "norm_topk_prob",
    "model_max_length": "max_position_embeddings",
}


class Fields:
    """Typed look-ups in one JSON object, under the published or transformers' spelling."""

    def __init__(self, values: Json, where: str, aliases: Mapping[str, str] = ALIASES) -> None:
        self.values, self.where, self.aliases = values, where, aliases

    def get(self, name: str) -> Any:
        """The value, None when absent. Two spellings that disagree are an error."""
        alias = self.aliases.get(name, name)
        value, other = self.values.get(name), self.values.get(alias)
        if name != alias and value is not None and other is not None and value != other:
            raise KimiError(
                f"{self.where}: {name} is {shown_json(value)} but {alias} is {shown_json(other)}; "
                "they name the same thing"
            )
        return other if value is None else value

    def missing(self, name: str) -> KimiError:
        return KimiError(f"{self.where}: {name} is missing")

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self.get(name)
        if value is None:
            if default is None:
                raise self.missing(name)
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise KimiError(
                f"{self.where}: {name} must be a whole number from {low} to {high} "
                f"but is {shown_json(value)}"
            )
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self.get(name)
        if value is None:
            if default is None:
                raise self.missing(name)
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
            raise KimiError(
                f"{self.where}: {name} must be a number between {low:g} and {high:g} "
                f"but is {shown_json(value)}"
            )
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise KimiError(
                f"{self.where}: {name} must be true or false but is {shown_json(value)}"
            )
        return value

    def must_be(self, name: str, *allowed: Any, required: bool = False) -> None:
        """This runtime computes one variant of the architecture; name any other."""
        value = self.get(name)
        if value is None and not required:
            return
        if not any(value == choice and type(value) is type(choice) for choice in allowed):
            choices = " or ".join(shown_json(choice) for choice in allowed)
            raise KimiError(f"{self.where}: {name} must be {choices} but is {shown_json(value)}")

    def strings(self, name: str, count: int, meanings: Mapping[str, Any]) -> list[Any] | None:
        """A list of one word a layer, each replaced by what it means; None when absent."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count:
            raise KimiError(f"{self.where}: {name} must list one word for each of {count} layers")
        for word in value:
            if not isinstance(word, str) or word not in meanings:
                raise KimiError(
                    f"{self.where}: {name} may hold {', '.join(meanings)} "
                    f"but holds {shown_json(word)}"
                )
        return [meanings[word] for word in value]

    def layer_numbers(self, name: str, count: int) -> list[int] | None:
        """A list of 1-based layer numbers; None when absent."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise KimiError(f"{self.where}: {name} must be a list but is {shown_json(value)}")
        if len(value) > count:
            raise KimiError(
                f"{self.where}: {name} must hold at most {count} layer numbers "
                f"but holds {len(value)}"
            )
        for number in value:
            if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= count:
                raise KimiError(
                    f"{self.where}: {name} must hold layer numbers from 1 to {count} "
                    f"but holds {shown_json(number)}"
                )
        return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        KimiError: the file is missing, or `read_json_if_there` refuses it.
    """
    if not is_there(path):
        raise KimiError(f"{path}: no such file")
    return read_json_if_there(path)


def shown_json(value: Any) -> str:
    """A value in an error: at most 80 characters, on one line."""
    try:
        text = json.dumps(value, default=repr)
    except RecursionError:
        return "nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."
