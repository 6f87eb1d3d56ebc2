"""Kimi Linear on Apple Silicon: load, generate, chat."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_kimi.errors import KimiError

if TYPE_CHECKING:
    from mlx_kimi.chat.chat import Chat
    from mlx_kimi.generation.answer import Chunk, Stats
    from mlx_kimi.generation.generate import generate, stream_generate
    from mlx_kimi.generation.token_state import TokenState
    from mlx_kimi.loading.budget import Budget
    from mlx_kimi.loading.load import load, load_model

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "Chat",
    "Chunk",
    "KimiError",
    "Stats",
    "TokenState",
    "generate",
    "load",
    "load_model",
    "stream_generate",
]

_MODULES = {
    "Budget": "mlx_kimi.loading.budget",
    "Chat": "mlx_kimi.chat.chat",
    "Chunk": "mlx_kimi.generation.answer",
    "Stats": "mlx_kimi.generation.answer",
    "TokenState": "mlx_kimi.generation.token_state",
    "generate": "mlx_kimi.generation.generate",
    "stream_generate": "mlx_kimi.generation.generate",
    "load": "mlx_kimi.loading.load",
    "load_model": "mlx_kimi.loading.load",
}


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: what needs no model starts in a fraction of the time.

    Raises:
        KimiError: MLX has no backend here.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULES[name]), name)
    except ImportError:
        from mlx_kimi.backend import missing

        if problem := missing():
            raise KimiError(problem) from None
        raise
