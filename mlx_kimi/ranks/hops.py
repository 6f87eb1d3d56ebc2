"""What goes from rank to rank at each step: x and residual after a rank's layers."""

from __future__ import annotations

import threading

import mlx.core as mx

from mlx_kimi.errors import KimiError, in_words
from mlx_kimi.ranks.control import SILENCE
from mlx_kimi.ranks.failure import ended_after
from mlx_kimi.ranks.launched import Launched

SLOWER = 60  # seconds that backends may take to connect which set up more than sockets


class Hops:
    """Rank r receives from rank r + 1, which has the layers before, and sends to rank r - 1.

    ring and jaccl send and receive on a stream of the CPU, since Metal has none for them. NCCL, in
    MLX, only adds up: there a hop is the sum of what one rank has and the other's zeros, on the
    GPU's own stream, and so is the token that rank 0 has drawn.

    Attributes:
        on_device: whether a hop is in the device's order, so that nobody has to await it.
    """

    def __init__(self, launched: Launched, on_device: bool | None = None) -> None:
        """Connect to the others, all at the same time. `on_device` None: where NCCL is used.

        Raises:
            KimiError: MLX's backend says that it cannot.
        """
        self.rank = launched.rank
        self.on_device = launched.backend == "nccl" if on_device is None else on_device
        limit = SILENCE if launched.backend == "ring" else SLOWER
        lost = (
            f"{launched.name(launched.rank)} waited {limit} seconds for the others to connect by "
            f"{launched.backend}: one ended or cannot be reached; see what it said, and start all "
            "ranks again"
        )
        with ended_after(limit, lost):
            try:
                self._group = mx.distributed.init(strict=True, backend=launched.backend)
            except RuntimeError as error:
                said = in_words(error)
                raise KimiError(f"the ranks cannot connect by {launched.backend}: {said}") from None
        self._of_thread = threading.local()  # MLX's streams are of one thread each
        self._sent: mx.array | None = None  # kept until the next: it may be under way

    @property
    def _stream(self) -> mx.Stream:
        """Beside what computes: a hop that waits does not hold it up."""
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = mx.new_stream(mx.cpu)
        stream: mx.Stream = self._of_thread.stream
        return stream

    def send(self, x: mx.array) -> None:
        """x [2, B, T, hidden] to the rank before, once it is computed."""
        self.awaited(x)
        if self._sent is not None:
            self.awaited(self._sent)  # no more than one is under way
        self._sent = self._to(x, self.rank - 1)
        mx.async_eval(self._sent)

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """What the rank after sends, [2, B, T, hidden]; it is under way."""
        return self._received(shape, dtype, self.rank + 1)

    def send_token(self, token: mx.array) -> None:
        """A token [1, 1] that rank 0 has drawn, to the first layers, once it is computed."""
        self._sent = self._to(token.astype(mx.int32), self._group.size() - 1)
        mx.async_eval(self._sent)

    def receive_token(self) -> mx.array:
        """What rank 0 sends, [1, 1] int32; it is under way."""
        return self._received((1, 1), mx.int32, 0)

    def awaited(self, received: mx.array) -> mx.array:
        """The same, once it is here; on the device at once.

        No command buffer of a GPU is to wait for the network: Metal ends one that waits long.
        """
        if not self.on_device:
            mx.eval(received)
        return received

    def sum(self, x: mx.array) -> mx.array:
        """x of all ranks, added up, with the same bits on each; lazy, and may be in a graph."""
        return mx.distributed.all_sum(x, group=self._group)

    def _to(self, x: mx.array, rank: int) -> mx.array:
        if self.on_device:
            return mx.distributed.all_sum(x, group=self._group)
        return mx.distributed.send(x, rank, group=self._group, stream=self._stream)

    def _received(self, shape: tuple[int, ...], dtype: mx.Dtype, rank: int) -> mx.array:
        if self.on_device:
            x = mx.distributed.all_sum(mx.zeros(shape, dtype), group=self._group)
        else:
            x = mx.distributed.recv(shape, dtype, rank, group=self._group, stream=self._stream)
        mx.async_eval(x)
        return x
