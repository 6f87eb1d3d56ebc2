"""Ranks find each other, agree on the model, load their layers and begin."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import mlx.core as mx

from mlx_kimi import __version__
from mlx_kimi.chat.fingerprint import model_hash
from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.files import Checkpoint
from mlx_kimi.defaults import PREFILL_STEP
from mlx_kimi.errors import KimiError, in_words
from mlx_kimi.loading.load import array_bytes, load_model
from mlx_kimi.loading.memory import ANY_SIZE, Machine
from mlx_kimi.metal_kernels.tuning import Choices
from mlx_kimi.ranks.control import Control, Message
from mlx_kimi.ranks.failure import end
from mlx_kimi.ranks.follow import Follower
from mlx_kimi.ranks.heads import HeadsFollower, HeadsModel, Sum
from mlx_kimi.ranks.hops import Hops
from mlx_kimi.ranks.launched import Launched
from mlx_kimi.ranks.model import RankedModel
from mlx_kimi.ranks.shares import BY_HEADS, by_memory, parts_of, share_of
from mlx_kimi.units import human_size

# What all ranks must have alike: how it is called, and what makes it so.
ALIKE = {
    "mlx_kimi": ("mlx_kimi", "install the same version on both"),
    "mlx": ("MLX", "install the same version on both"),
    "model": ("model files of the digest", "copy rank 0's folder there"),
    "device": ("the device", "all ranks compute on the same kind of device"),
    "kernels": ("kernels of the digest", "set the same MLX_KIMI_ variables on both"),
}

HEADS_ARE_SLOWER = (
    "--split heads adds up after each half of a layer: on Macs a token is slower than on one of "
    "them, which docs/ranks.md estimates"
)


def lead(
    launched: Launched,
    folder: Path,
    split: str,
    say: Callable[[str], None],
    connected: Callable[[Launched], Hops] = Hops,
) -> RankedModel:
    """As rank 0: the model, of whose layers other ranks have the first.

    Args:
        split: as of `shares.parts_of`.
        say: takes a line for a person who waits for other ranks.
        connected: connects the ranks, once all have loaded.

    Raises:
        KimiError: a rank does not come, has another model or version, or too little memory.
        OptionError: `split` does not fit the model and the ranks.
    """
    control = Control(launched)
    try:
        others = control.first_messages(say)
        own = introduction(folder)
        for rank, message in sorted(others.items()):
            _refuse_other(launched, rank, message, own)
        machines = [own, *(others[rank] for rank in sorted(others))]
        parts = _parts(launched, folder, split, machines)
        for rank in others:
            part = None if parts is None else [parts[rank].start, parts[rank].stop]
            control.send(rank, {"do": "load", "part": part})
        added = Sum()
        if parts is None:
            say(HEADS_ARE_SLOWER)
            shard = (0, launched.size)
            model = load_model(folder, shard=shard, reduce=added, make=HeadsModel)
        else:
            model = load_model(folder, part=parts[0], make=RankedModel)
        assert isinstance(model, RankedModel)
        for rank in others:
            control.receive(rank)
        control.broadcast({"do": "connect"})
        added.hops = connected(launched)
        return model.connect(control, added.hops)
    except BaseException:
        control.close(failed=True)
        raise


def follow(
    launched: Launched,
    folder_of: Callable[[], Path],
    connected: Callable[[Launched], Hops] = Hops,
) -> NoReturn:
    """As another rank: load the layers that rank 0 says, and do what it asks for, until the end.

    It reads nothing from stdin, and prints nothing but what ends it.
    """
    # Ctrl-C is for rank 0, which may go on; the terminal sends it to all.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        folder = folder_of()
        control = Control(launched)
        control.introduce(introduction(folder))
        part, added = _told(control, "load")["part"], Sum()
        shard = (launched.rank, launched.size)
        model = (
            load_model(folder, shard=shard, reduce=added)
            if part is None
            else load_model(folder, part=range(*part))
        )
        control.send(0, {"is": "loaded"})
        _told(control, "connect")
        added.hops = connected(launched)
        kind = HeadsFollower if part is None else Follower
        kind(model, control, added.hops).run()
    except Exception as error:
        end(f"{launched.name(launched.rank)}: {in_words(error)}")


def _told(control: Control, what: str) -> Message:
    """What rank 0 says next; if that all is over, this process ends."""
    message, _ = control.receive()
    if message["do"] == "end":
        os._exit(int(message["failed"]))
    assert message["do"] == what, message
    return message


def introduction(folder: Path) -> Message:
    """What a rank says of itself."""
    machine = Machine.here()
    device = "CPU" if mx.default_device() == mx.Device(mx.cpu) else "GPU"
    return {
        "mlx_kimi": __version__,
        "mlx": version("mlx"),
        "model": model_hash(folder, Checkpoint(folder)),
        "device": device,
        "kernels": Choices.default().digest,
        "limit": machine.limit,
        "total": machine.total,
    }


def _refuse_other(launched: Launched, rank: int, message: Message, own: Message) -> None:
    """Refuse a rank that would compute another model, or otherwise."""
    for key, (what, do) in ALIKE.items():
        theirs, ours = message.get(key), own[key]
        if theirs != ours:
            raise KimiError(
                f"{launched.name(rank)} has {what} {theirs} and rank 0 has {ours}: {do}"
            )


def _parts(
    launched: Launched, folder: Path, split: str, machines: Sequence[Message]
) -> list[range] | None:
    """The layers of each rank, which fit there; None: all have all, by heads."""
    if split == BY_HEADS:
        return None  # (`load_model` refuses what does not fit)
    config, sizes = ModelConfig.read(folder), array_bytes(folder)
    totals = [machine["total"] for machine in machines]
    parts = parts_of(split, config, launched.size) or by_memory(config, sizes, totals)
    for rank, (part, machine) in enumerate(zip(parts, machines, strict=True)):
        needed = share_of(config, sizes, part).needs.at(PREFILL_STEP)
        if needed > machine["limit"] and not os.environ.get(ANY_SIZE):
            raise KimiError(
                f"{launched.name(rank)} needs {human_size(needed)} for layers {part.start} to "
                f"{part.stop - 1} and has {human_size(machine['limit'])}: give it fewer with "
                "--split layers=N,N, or use a model of fewer bits"
            )
    return parts
