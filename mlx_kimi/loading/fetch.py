"""A model by name: looked at before gigabytes are downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from mlx_kimi.checkpoint.files import Checkpoint
from mlx_kimi.checkpoint.hub import ALL_BUT_WEIGHTS, NEEDED, downloaded, is_folder, local_folder
from mlx_kimi.checkpoint.hub_weights import HubWeights
from mlx_kimi.errors import KimiError
from mlx_kimi.units import human_size
from mlx_kimi.user_files import is_there

Check = Callable[[Path, Checkpoint], object]


def headers_of(path_or_hub_id: str | Path) -> tuple[Path, Checkpoint]:
    """A model's folder, which may lack its weights, and what the weights' headers say.

    Of a name on the hub, small files are downloaded, and of the weights their headers alone. The
    arrays of such a checkpoint are zeros, for their shapes.

    Raises:
        KimiError: there is no such model, or its weights are no safetensors files.
    """
    if is_folder(path_or_hub_id):
        folder = local_folder(path_or_hub_id)
        return folder, Checkpoint(folder)
    found = _on_hub(str(path_or_hub_id))
    return found if isinstance(found, tuple) else (found.folder, found.checkpoint)


def fetched(
    path_or_hub_id: str | Path,
    check: Check = lambda folder, checkpoint: None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """The folder of a whole model, downloaded if it is not here.

    Args:
        path_or_hub_id: a folder, which is taken as it is, or a name on the hub.
        check: raises what is wrong with a model; called with its folder and its headers before its
            weights are downloaded.
        say: is told what the download takes.

    Raises:
        KimiError: there is no such model, the disk has no room for it, or the download failed.
    """
    if is_folder(path_or_hub_id):
        return local_folder(path_or_hub_id)
    name = str(path_or_hub_id)
    found = _on_hub(name)
    if isinstance(found, tuple):
        return found[0]
    check(found.folder, found.checkpoint)
    left = [file for file in found.checkpoint.files if not is_there(found.folder / file)]
    size, free = sum(map(found.size, left)), shutil.disk_usage(found.folder).free
    room = f"{human_size(size)} of weights to download, {human_size(free)} free on that disk"
    if size > free:
        raise KimiError(f"{name}: {room}")
    say(f"{name}: {room}")
    return downloaded(name, NEEDED, found.revision)


def _on_hub(name: str) -> tuple[Path, Checkpoint] | HubWeights:
    """What is in the hub's cache, if that is a whole model; else what the hub has."""
    folder = downloaded(name, ALL_BUT_WEIGHTS)
    try:
        return folder, Checkpoint(folder)
    except KimiError:  # some weights are not here
        return HubWeights(name, folder, revision=folder.name)
