"""What a conversion was asked to do: what must agree for another run to go on with it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mlx_kimi import __version__
from mlx_kimi.checkpoint import INDEX, Checkpoint
from mlx_kimi.convert.quantize import RECIPES, Scheme

Request = dict[str, str]  # what it is, in the user's words -> its value

JOURNAL = "2"  # raised when its records mean something else
SOURCE, CONTENT = "the source", "the content of the source"


def request(
    checkpoint: Checkpoint, beside: list[Path], scheme: Scheme | None, dtype: str | None, shard: int
) -> Request:
    """All that the bytes of the result depend on.

    Args:
        checkpoint: the source.
        beside: its files that are copied.
        scheme: how it is quantized, None if it is not.
        dtype: as `convert` takes it.
        shard: bytes of data in one file.
    """
    asked = {
        "the journal of version": JOURNAL,
        SOURCE: str(checkpoint.folder.resolve()),
        CONTENT: _fingerprint(checkpoint, beside),
        "mlx_kimi": __version__,
        "mlx": str(mx.__version__),  # type: ignore[attr-defined]  # the stubs forget it
        "the device": "cpu" if mx.default_device() == mx.Device(mx.cpu) else "gpu",
        "--dtype": dtype or "as in SRC",
        "bytes a file": str(shard),
    }
    if scheme is None:
        return {**asked, "quantization": "none"}
    default = scheme.default
    names = [name for name, recipe in RECIPES.items() if recipe.rules == scheme.rules]
    return {
        **asked,
        "quantization": "some",
        "--mode": default.mode,
        "--bits": str(default.bits),
        "--group-size": str(default.group_size),
        "--recipe": names[0] if names else repr(scheme.rules),
    }


def difference(stored: Mapping[str, str], present: Mapping[str, str]) -> str | None:
    """What is not as it was, in words: `--bits 4, now 8`. None if all is.

    A folder of the same content may lie elsewhere now.
    """
    for key in (*present, *stored):
        before, now = stored.get(key, "none"), present.get(key, "none")
        if key == SOURCE or before == now:
            continue
        if key != CONTENT:
            return f"{key} {before}, now {now}"
        if stored.get(SOURCE) != present.get(SOURCE):
            return f"the source {stored.get(SOURCE)}, now {present.get(SOURCE)}"
        return "a source whose files have changed since"
    return None


def _fingerprint(checkpoint: Checkpoint, beside: list[Path]) -> str:
    """Sizes, times and samples of the weights, and every byte of the small files."""
    digest = hashlib.sha256()
    for path in (checkpoint.folder / "config.json", checkpoint.folder / INDEX, *beside):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    for name, stored in sorted(checkpoint.tensors.items()):
        digest.update(repr((name, stored.file, stored.dtype, stored.shape)).encode())
    for file in checkpoint.files:
        status = (checkpoint.folder / file).stat()
        digest.update(repr((file, status.st_size, status.st_mtime_ns)).encode())
        digest.update(checkpoint.sample(file))
    return digest.hexdigest()[:32]
