"""The request of a conversion: another run goes on with the result of an equal one only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import mlx.core as mx

from mlx_kimi import __version__
from mlx_kimi.checkpoint.weight_source import WeightSource
from mlx_kimi.convert.quantize import RECIPES, Scheme

Request = dict[str, str]  # what it is, in the user's words -> its value

JOURNAL = "3"  # raised when its records mean something else
SOURCE, CONTENT = "the source", "the content of the source"
DELETING, REVISION = "--delete-source-shards", "the revision"


def request(
    source: WeightSource,
    small: Mapping[str, bytes],
    scheme: Scheme | None,
    dtype: str | None,
    max_shard: int,
) -> Request:
    """All that the bytes of the result depend on.

    Args:
        source: the weights.
        small: the `small_files` beside them.
        scheme: how matrices are quantized, None if they are not.
        dtype: as `convert` takes it.
        max_shard: bytes of data in one file.
    """
    asked = {
        "the journal of version": JOURNAL,
        DELETING: _yes_or_no(source.deletes),
        SOURCE: source.name,
        CONTENT: _fingerprint(source, small),
        REVISION: source.revision or "none",
        "mlx_kimi": __version__,
        "mlx": str(mx.__version__),  # type: ignore[attr-defined]  # the stubs forget it
        "the device": "cpu" if mx.default_device() == mx.Device(mx.cpu) else "gpu",
        "--dtype": dtype or "as in the model",
        "bytes a file": str(max_shard),
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
    """The first thing that changed, in words: `--bits 4, now 8`. None if nothing did.

    A folder may lie elsewhere now, if its content is the same.
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


def begun_revision(begun: Request, name: str) -> str | None:
    """The commit of model `name`, if the interrupted run converted it and deleted its shards."""
    same = begun.get(DELETING) == "yes" and begun.get(SOURCE) == name
    return begun.get(REVISION) if same else None


def other_deleting(begun: Request, deleting: bool) -> str | None:
    """What changed about the deletion of shards, as of `difference`; None if nothing did."""
    return difference({DELETING: begun.get(DELETING, "no")}, {DELETING: _yes_or_no(deleting)})


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def _fingerprint(source: WeightSource, small: Mapping[str, bytes]) -> str:
    """A digest of every byte of the small files, and of what tells the weights from others."""
    digest = hashlib.sha256()
    for name, data in small.items():
        digest.update(name.encode() + data)
    for name, stored in sorted(source.checkpoint.tensors.items()):
        digest.update(repr((name, stored.file, stored.dtype, stored.shape)).encode())
    digest.update(repr(source.fingerprint()).encode())
    return digest.hexdigest()[:32]
