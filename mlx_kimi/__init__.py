"""Kimi Linear on Apple Silicon: load, generate, chat."""

from mlx_kimi import backend
from mlx_kimi.errors import KimiError

__version__ = "0.1.0"
__all__ = ["KimiError", "generate", "load", "load_model", "stream_generate"]

if not backend.missing():  # else the program says so in one line, and the imports below would not
    from mlx_kimi.generation.generate import generate, stream_generate
    from mlx_kimi.loading.load import load, load_model
