"""The source of a conversion, chosen once: a folder, or a model on the hub shard by shard."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.files import Checkpoint
from mlx_kimi.checkpoint.hub import is_folder
from mlx_kimi.checkpoint.hub_weights import HubWeights
from mlx_kimi.checkpoint.weight_source import FolderWeights, WeightSource
from mlx_kimi.convert.blocks import TensorReader
from mlx_kimi.convert.partial import begun_otherwise, downloads_of, interrupted_request
from mlx_kimi.convert.request import begun_revision, other_deleting
from mlx_kimi.errors import KimiError
from mlx_kimi.loading.fetch import fetched
from mlx_kimi.loading.match import check

Around = Callable[[], AbstractContextManager[object]]


def open_source(
    source: str | Path,
    out: Path,
    delete_source_shards: bool,
    around_downloads: Around,
    say: Callable[[str], None],
) -> WeightSource:
    """Where the weights come from; the arguments are those of `convert`.

    A model on the hub is downloaded as a whole, or without its weights if its shards are deleted.

    Raises:
        KimiError: there is no such model, a folder's shards should be deleted, an interrupted
            conversion to `out` deletes shards and this one does not or the other way round, or
            `out` lies in the source.
    """
    begun = interrupted_request(out)
    if begun and (changed := other_deleting(begun, delete_source_shards)):
        raise KimiError(begun_otherwise(out, changed))  # before the whole source is downloaded
    weights: WeightSource
    if not delete_source_shards:
        with around_downloads():
            weights = FolderWeights(fetched(source, _config_of_unquantized, say))
    elif is_folder(source):
        raise KimiError(
            f"{source}: --delete-source-shards is for a name on the hub, whose shards can be "
            "downloaded again; nothing in a folder is ever deleted"
        )
    else:
        name = str(source)
        revision = begun_revision(begun, name) if begun else None
        weights = HubWeights(name, downloads_of(out), revision, around_downloads)
    if out.resolve().is_relative_to(weights.folder.resolve()):
        raise KimiError(f"{out}: the result cannot lie inside its source {weights.folder}")
    return weights


def open_reader(source: WeightSource) -> TensorReader:
    """The tensors of a whole, unquantized model.

    Raises:
        KimiError: the source is something else.
    """
    config = _config_of_unquantized(source.folder, source.checkpoint)
    return TensorReader(source.checkpoint, config)


def _config_of_unquantized(folder: Path, checkpoint: Checkpoint) -> ModelConfig:
    config = ModelConfig.read(folder)
    found = config.quantization
    if found is not None:
        raise KimiError(
            f"{folder}: is quantized already ({found.mode}, {found.bits} bits, group "
            f"{found.group_size}); convert the checkpoint that it was made from"
        )
    check(config, checkpoint)
    return config
