"""The folder of what can be found out again: deleting it costs time, nothing else."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = "MLX_KIMI_CACHE"  # names another folder in the environment


def cache_folder() -> Path:
    """The user's, or the one that the environment names; it may not exist yet."""
    named = os.environ.get(FOLDER)
    if named:
        return Path(named).expanduser()
    from platformdirs import user_cache_path  # here: most programs that import this never ask

    return user_cache_path("mlx_kimi", appauthor=False)
