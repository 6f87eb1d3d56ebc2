"""Kimi Linear on Apple Silicon: load, generate, chat."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_kimi.errors import KimiError

if TYPE_CHECKING:
    from mlx_kimi.generation.generate import generate, stream_generate
    from mlx_kimi.loading.load import load, load_model

__version__ = "0.1.0"
__all__ = ["KimiError", "generate", "load", "load_model", "stream_generate"]

_MODULES = {
    "generate": "mlx_kimi.generation.generate",
    "stream_generate": "mlx_kimi.generation.generate",
    "load": "mlx_kimi.loading.load",
    "load_model": "mlx_kimi.loading.load",
}


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: what needs no model starts in a fraction of the time."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
