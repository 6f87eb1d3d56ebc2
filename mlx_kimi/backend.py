"""Whether MLX can compute here. On Linux its backend is a package of its own."""

from __future__ import annotations

import re

NEWEST_TRIED = "0.32.4"  # of MLX; pyproject.toml has the oldest that runs


def untried() -> str | None:
    """That MLX is newer than any that was tried, in one line; None: it is not."""
    from importlib.metadata import version  # here: it takes long, and few ask

    installed = version("mlx")
    if _numbers(installed) <= _numbers(NEWEST_TRIED):
        return None
    return (
        f"MLX {installed} is newer than {NEWEST_TRIED}, the newest that was tried: "
        "`mlx_kimi check` compares it with float64"
    )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text)[:3]]


def missing() -> str | None:
    """Why MLX cannot be imported, in one line that says what to install; None when it can."""
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        return (
            "MLX has no backend here: install mlx_kimi[cpu] or, for NVIDIA GPUs, mlx_kimi[cuda13] "
            f"({error})"
        )
    return None
