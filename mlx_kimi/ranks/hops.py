"""What goes from rank to rank at each step: x and residual after a rank's layers."""

from __future__ import annotations

import faulthandler
import os

import mlx.core as mx

from mlx_kimi.errors import KimiError, in_words
from mlx_kimi.ranks.control import SILENCE
from mlx_kimi.ranks.launched import Launched


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
        # `init` waits for the others and lets no other thread run: this ends it if one is lost.
        with open(os.devnull, "w") as nowhere:
            faulthandler.dump_traceback_later(SILENCE, exit=True, file=nowhere)
            try:
                self._group = mx.distributed.init(strict=True, backend=launched.backend)
            except RuntimeError as error:
                said = in_words(error)
                raise KimiError(f"the ranks cannot connect by {launched.backend}: {said}") from None
            finally:
                faulthandler.cancel_dump_traceback_later()
        self._stream = None if self.on_device else mx.new_stream(mx.cpu)
        self._sent: mx.array | None = None  # kept until the next: it may be under way

    def send(self, x: mx.array) -> None:
        """x [2, B, T, hidden] to the rank before; on the CPU's stream once it is computed."""
        if self.on_device:
            self._sent = mx.distributed.all_sum(x, group=self._group)
        else:
            mx.eval(x)
            if self._sent is not None:
                mx.eval(self._sent)
            self._sent = mx.distributed.send(
                x, self.rank - 1, group=self._group, stream=self._stream
            )
        mx.async_eval(self._sent)

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """What the rank after sends, [2, B, T, hidden]; on the device queued, else not begun."""
        if self.on_device:
            x = mx.distributed.all_sum(mx.zeros(shape, dtype), group=self._group)
            mx.async_eval(x)
            return x
        return mx.distributed.recv(
            shape, dtype, self.rank + 1, group=self._group, stream=self._stream
        )

    def share_token(self, token: mx.array) -> mx.array:
        """On the device: [1, 1] int32 of rank 0; the other rank gives zeros."""
        token = mx.distributed.all_sum(token.astype(mx.int32), group=self._group)
        mx.async_eval(token)
        return token
