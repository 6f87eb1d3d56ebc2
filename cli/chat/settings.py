"""/set: what may be changed while talking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlx_kimi.errors import KimiError
from mlx_kimi.generation.generate import check_lengths
from mlx_kimi.generation.sample import Sampling

KINDS: dict[str, Callable[[str], Any]] = {
    "temp": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "seed": lambda text: None if text == "random" else int(text),
    "max_tokens": int,
}
MARKDOWN = "markdown"
NAMES = (*KINDS, MARKDOWN)


def changed(options: Mapping[str, Any], name: str, text: str) -> dict[str, Any]:
    """`options` with one more value.

    Raises:
        KimiError: it is no value for this option.
    """
    if name not in KINDS:
        raise KimiError(f"there is no setting {name}, only {', '.join(NAMES)}")
    try:
        value = KINDS[name](text)
    except ValueError:
        raise KimiError(f"{name} must be a number but is {text!r}") from None
    new = {**options, name: value}
    Sampling(**{field: new[field] for field in KINDS if field != "max_tokens"})
    check_lengths(new["max_tokens"], new["prefill_step"])
    return new


def shown(options: Mapping[str, Any]) -> str:
    """All settings but `markdown`, a line each."""
    values = {name: options[name] for name in KINDS}
    values["seed"] = "random" if values["seed"] is None else values["seed"]
    return "\n".join(f"{name:<19} {value}" for name, value in values.items())
