"""The states of a conversation as files, one a turn: what the turn added, and where it ended.

A file holds the latents of its own tokens, so that a turn costs its own length on disk and not
the conversation's, and the KDA states after its last token. Files in a row are a conversation; the
end of each can be gone back to as long as its KDA states are there.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.files import lazy_arrays, read_header
from mlx_kimi.durable import checksum, write_durably
from mlx_kimi.errors import KimiError, in_words
from mlx_kimi.generation.token_state import Snapshot, TokenState
from mlx_kimi.metal_kernels.latents import is_packed, pack
from mlx_kimi.model.cache import (
    TAIL,
    CacheEntry,
    KDACache,
    LatentCache,
    RemoteCache,
    Segment,
    numbered,
)
from mlx_kimi.model.kimi_linear import KimiLinear

SUFFIX = ".safetensors"
NAME = re.compile(rf"\d+-\d+-[0-9a-f]{{8}}{re.escape(SUFFIX)}")  # of a file: START-END-X
PARTS = ("frozen", "tail")  # of an MLA layer's latents, in this order
Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class StateFile:
    """The tokens start..end of a conversation, in a file of its folder."""

    file: str
    start: int
    end: int
    checksum: int
    has_kda: bool = True


def is_state_file(name: str) -> bool:
    """Whether `write_state` could have given a file this name; a model's weights never have it."""
    return NAME.fullmatch(name) is not None


def write_state(folder: Path, state: TokenState, start: int) -> StateFile:
    """Store what `state` has read from token `start` on, and its present state."""
    arrays = token_arrays(state.ids[start:], state.entries, start) | kda_arrays(state.entries)
    return _write(folder, arrays, start, len(state.ids), has_kda=True)


def token_arrays(ids: Sequence[int], entries: Sequence[CacheEntry], start: int) -> Arrays:
    """What is kept of tokens themselves: `ids`, those from token `start` on, and their latents."""
    arrays = {"ids": mx.array(list(ids), mx.int32)}
    for layer, entry in numbered(entries):
        if isinstance(entry, LatentCache):
            arrays |= {f"{name}.{layer}": a for name, a in _latents_since(entry, start).items()}
        elif isinstance(entry, RemoteCache) and entry.state is not None:
            arrays |= entry.state.latents(start)
    return arrays


def kda_arrays(entries: Sequence[CacheEntry]) -> Arrays:
    """What is kept of the place after the last token, to go on from there."""
    arrays: Arrays = {}
    for layer, entry in numbered(entries):
        if isinstance(entry, KDACache):
            assert entry.conv_tail is not None and entry.state is not None
            arrays |= {f"conv.{layer}": entry.conv_tail, f"state.{layer}": entry.state}
        elif isinstance(entry, RemoteCache) and entry.state is not None:
            arrays |= entry.state.kda_states()
    return arrays


def without_kda(folder: Path, files: Sequence[StateFile]) -> StateFile:
    """The tokens of neighbouring files in one new file, whose end cannot be gone back to."""
    loaded = [load_arrays(folder / stored.file) for stored in files]
    start, end = files[0].start, files[-1].end
    arrays = {"ids": mx.concatenate([part["ids"] for part in loaded])}
    layers = {name.split(".")[1] for part in loaded for name in part if name.startswith(PARTS)}
    for layer in layers:
        frozen, tail = _split(loaded, layer, start, end)
        if any(is_packed(segment.latents) for segment in frozen):
            frozen = [segment.packed() for segment in frozen]
        for name, segments in zip(PARTS, (frozen, tail), strict=True):
            if segments:
                arrays[f"{name}.{layer}"] = Segment.concatenate(segments).rows
    return _write(folder, arrays, start, end, has_kda=False)


def compacted(folder: Path, files: Sequence[StateFile], return_points: int) -> list[StateFile]:
    """`files` with KDA states in the latest alone, and few files before them.

    Neighbours merge when the later one has grown as large, so that a token is rewritten as often as
    its conversation doubles.
    """
    old: list[StateFile] = []
    for stored in files[:-return_points]:
        run = [stored]
        while old and old[-1].end - old[-1].start <= run[-1].end - run[0].start:
            run.insert(0, old.pop())
        changed = len(run) > 1 or stored.has_kda
        old.append(without_kda(folder, run) if changed else stored)
    return [*old, *files[-return_points:]]


def whole_part(folder: Path, files: Sequence[StateFile]) -> list[StateFile]:
    """The files from the first on that are undamaged and follow each other."""
    whole: list[StateFile] = []
    for stored in files:
        follows = stored.start == (whole[-1].end if whole else 0)
        if not (follows and _is_whole(folder / stored.file, stored.checksum)):
            break
        whole.append(stored)
    while whole and not whole[-1].has_kda:
        whole.pop()
    return whole


def _is_whole(path: Path, stored: int) -> bool:
    """Whether it is a file of arrays that has this checksum."""
    try:
        size = read_header(path).version.size  # which bounds what is read
        return checksum(path, size) == stored
    except (KimiError, OSError):
        return False


def restore_states(state: TokenState, folder: Path, files: Sequence[StateFile]) -> None:
    """Bring an empty `state` to the end of `files`, able to go back to the end of each.

    Earlier ends take no memory and no time until they are gone back to.

    Raises:
        KimiError: an array is missing or has another shape than the model's.
    """
    if not files:
        return
    try:
        ids, entries = _read(state, folder, files)
        mx.eval([array for entry in entries for array in entry.arrays()])
    except RuntimeError as error:  # MLX's own, for a file that was cut meanwhile
        raise KimiError(f"{folder}: its states cannot be read: {in_words(error)}") from None
    state.ids, state.entries = ids, entries
    for count, stored in enumerate(files[:-1], start=1):
        if stored.has_kda:
            load = partial(_load_again, state, folder, files[:count])
            state.snapshots.append(Snapshot(stored.end, None, load=load))
    state.take_snapshot()


def _load_again(
    state: TokenState, folder: Path, files: Sequence[StateFile]
) -> list[CacheEntry] | None:
    """An earlier state; None if its files were replaced or damaged since the session was read."""
    if len(whole_part(folder, files)) < len(files):
        return None
    try:
        _, entries = _read(state, folder, files)
        mx.eval([array for entry in entries for array in entry.arrays()])
    except (KimiError, RuntimeError):  # MLX's own, for a file that was cut meanwhile
        return None
    return entries


def _write(folder: Path, arrays: Arrays, start: int, end: int, has_kda: bool) -> StateFile:
    # A name of its own: the files of a conversation are never written over.
    path = folder / f"{start}-{end}-{secrets.token_hex(4)}{SUFFIX}"
    write_durably(path, lambda made: mx.save_safetensors(str(made), arrays))
    return StateFile(path.name, start, end, checksum(path), has_kda)


def _latents_since(entry: LatentCache, start: int) -> Arrays:
    """The latents after token `start`: `frozen`, packed if the cache packs them, and `tail`."""
    parts: dict[str, list[mx.array]] = {"frozen": [], "tail": []}
    begin = 0
    for i, segment in enumerate(entry.segments(0)):
        first, size = max(start - begin, 0), segment.size
        if first < size:
            name = "frozen" if i < len(entry.frozen[0]) else "tail"
            parts[name].append(segment.slice(first, size).rows)
        begin += size
    return {name: mx.concatenate(found, axis=1) for name, found in parts.items() if found}


def load_arrays(path: Path) -> Arrays:
    """The arrays of a file, each read when it is evaluated.

    Raises:
        KimiError: it is no such file.
    """
    header = read_header(path)  # MLX checks less of it
    return lazy_arrays(path, header.version, "states were read")


def _read(
    state: TokenState, folder: Path, files: Sequence[StateFile]
) -> tuple[list[int], list[CacheEntry]]:
    """The ids of `files` and the state after them, not yet read from disk."""
    loaded = [load_arrays(folder / stored.file) for stored in files]
    where = f"{folder / files[-1].file}"
    return read_entries(loaded, state.model, state.latent_bits, files[-1].end, where)


def read_entries(
    loaded: Sequence[Arrays], model: KimiLinear, latent_bits: int | None, end: int, where: str
) -> tuple[list[int], list[CacheEntry]]:
    """The first `end` tokens of a text and the state after them, not yet read from disk.

    Args:
        loaded: the `token_arrays` of its parts in their order, with the `kda_arrays` of the last.
        latent_bits: of `KimiLinear.make_cache`.
        where: for errors.

    Raises:
        KimiError: an array is missing, or has another shape than the model's.
    """
    ids = [token for part in loaded for token in stored_ids(part, model.config.vocab_size, where)]
    if len(ids) != end:
        raise KimiError(f"{where}: ends at token {end}, but {len(ids)} are stored")
    layers = range(len(model.config.layers))
    entries = layer_entries(loaded, model.config, layers, latent_bits, end, where)
    return ids, model.cache_of(entries, latent_bits)


def layer_entries(
    loaded: Sequence[Arrays],
    config: ModelConfig,
    layers: Sequence[int],
    latent_bits: int | None,
    end: int,
    where: str,
) -> list[CacheEntry]:
    """The cache of some layers after `end` tokens, as of `read_entries`.

    Raises:
        KimiError: an array is missing, or has another shape than the model's.
    """
    return [
        _kda(config, loaded[-1], layer, end, where)
        if config.layers[layer].attention == "kda"
        else _latents(config, latent_bits, loaded, layer, end, where)
        for layer in layers
    ]


def stored_ids(arrays: Arrays, vocab: int, where: str) -> list[int]:
    """The tokens of a part.

    Raises:
        KimiError: there are none, or they are not of this vocabulary.
    """
    ids = arrays.get("ids")
    if ids is None or ids.ndim != 1 or ids.dtype != mx.int32:
        raise KimiError(f"{where}: ids must be a vector of int32")
    found: list[int] = np.array(ids).tolist()
    if found and not (min(found) >= 0 and max(found) < vocab):
        raise KimiError(f"{where}: ids must be from 0 to {vocab - 1}")
    return found


def _kda(c: ModelConfig, arrays: Arrays, layer: int, length: int, where: str) -> KDACache:
    H, D, K = c.kda_num_heads, c.kda_head_dim, c.short_conv_kernel_size
    conv_tail = _array(arrays, f"conv.{layer}", (1, K - 1, 3 * H * D), where)
    kda_state = _array(arrays, f"state.{layer}", (1, H, D, D), where)
    return KDACache((length,), conv_tail, kda_state)


def _latents(
    config: ModelConfig,
    latent_bits: int | None,
    loaded: Sequence[Arrays],
    layer: int,
    length: int,
    where: str,
) -> LatentCache:
    """The cache as it was: whole multiples of TAIL are frozen, the rest is the tail."""
    for arrays in loaded:
        for name in PARTS:
            if f"{name}.{layer}" in arrays:
                part = arrays[f"{name}.{layer}"]
                _check_latents(config, f"{name}.{layer}", part, where)
    frozen, tail = _split(loaded, str(layer), 0, length)
    held = sum(segment.size for segment in (*frozen, *tail))
    if held != length:
        raise KimiError(f"{where}: layer {layer} has latents of {held} tokens, not of {length}")
    if latent_bits:
        frozen = [segment.packed() for segment in frozen]
    return LatentCache(
        (length,),
        ((Segment.concatenate(frozen),) if frozen else (),),
        Segment.concatenate(tail).rows if tail else None,
        (length % TAIL,),
        latent_bits,
    )


def _check_latents(config: ModelConfig, name: str, latents: mx.array, where: str) -> None:
    if not is_packed(latents):
        _check_floats(name, latents, where)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    plain = mx.zeros((1, 1, width))
    *_, width = (pack(plain) if is_packed(latents) else plain).shape
    _check_shape(name, latents, (1, latents.size // width, width), where)


def _split(
    loaded: Sequence[Arrays], layer: str, start: int, end: int
) -> tuple[list[Segment], list[Segment]]:
    """The latents from token `start` to `end`: those that are frozen at `end`, and its tail."""
    full, at = end // TAIL * TAIL, start
    frozen: list[Segment] = []
    tail: list[Segment] = []
    for arrays in loaded:
        for name in PARTS:
            if f"{name}.{layer}" in arrays:
                segment = Segment.whole(arrays[f"{name}.{layer}"])
                # A tail was shorter than TAIL, and has been frozen as a whole or not at all.
                (frozen if at < full else tail).append(segment)
                at += segment.size
    return frozen, tail


def _array(arrays: Arrays, name: str, shape: tuple[int, ...], where: str) -> mx.array:
    if name not in arrays:
        raise KimiError(f"{where}: {name} is missing")
    _check_floats(name, arrays[name], where)
    return _check_shape(name, arrays[name], shape, where)


def _check_floats(name: str, array: mx.array, where: str) -> None:
    if not mx.issubdtype(array.dtype, mx.floating):
        raise KimiError(f"{where}: {name} must be of floats but is of {array.dtype}")


def _check_shape(name: str, array: mx.array, shape: tuple[int, ...], where: str) -> mx.array:
    if array.shape != shape:
        raise KimiError(f"{where}: {name} has shape {array.shape}, expected {shape}")
    return array
