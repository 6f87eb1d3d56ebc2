"""What a conversion was asked to do: what must agree for another run to go on with it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_kimi import __version__
from mlx_kimi.checkpoint.files import Checkpoint
from mlx_kimi.checkpoint.hub_weights import HubWeights
from mlx_kimi.convert.quantize import RECIPES, Scheme

Request = dict[str, str]  # what it is, in the user's words -> its value

JOURNAL = "2"  # raised when its records mean something else
SOURCE, CONTENT = "the source", "the content of the source"
DELETING, REVISION = "--delete-source-shards", "the revision"


def request(
    checkpoint: Checkpoint,
    small: Mapping[str, bytes],
    scheme: Scheme | None,
    dtype: str | None,
    shard: int,
    hub: HubWeights | None = None,
) -> Request:
    """All that the bytes of the result depend on.

    Args:
        checkpoint: the source.
        small: its `small_files`.
        scheme: how it is quantized, None if it is not.
        dtype: as `convert` takes it.
        shard: bytes of data in one file.
        hub: where its weights come from one file at a time.
    """
    weights = _weights_of_folder(checkpoint) if hub is None else [hub.revision, hub.files]
    asked = {
        "the journal of version": JOURNAL,
        DELETING: _yes_or_no(hub is not None),
        SOURCE: str(checkpoint.folder.resolve()) if hub is None else hub.name,
        CONTENT: _fingerprint(checkpoint, small, weights),
        REVISION: "none" if hub is None else hub.revision,
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


def begun_revision(begun: Request, name: str) -> str | None:
    """The commit of model `name` that a conversion with its shards deleted was begun with."""
    same = begun.get(DELETING) == "yes" and begun.get(SOURCE) == name
    return begun[REVISION] if same else None


def other_deleting(begun: Request, deleting: bool) -> str | None:
    """What is not as it was about deleting shards, as of `difference`; None if nothing is."""
    return difference({DELETING: begun.get(DELETING, "no")}, {DELETING: _yes_or_no(deleting)})


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def _fingerprint(checkpoint: Checkpoint, small: Mapping[str, bytes], weights: list[Any]) -> str:
    """What tells the weights from others, and every byte of the small files."""
    digest = hashlib.sha256()
    for name, data in small.items():
        digest.update(name.encode() + data)
    for name, stored in sorted(checkpoint.tensors.items()):
        digest.update(repr((name, stored.file, stored.dtype, stored.shape)).encode())
    digest.update(repr(weights).encode())
    return digest.hexdigest()[:32]


def _weights_of_folder(checkpoint: Checkpoint) -> list[Any]:
    """Sizes, times and samples."""
    versions = {file: checkpoint.headers[file].version for file in checkpoint.files}
    return [
        (file, version.size, version.modified, checkpoint.sample(file))
        for file, version in versions.items()
    ]
