"""Commands and replies between rank 0 and the others, and the watch over who lives.

Each other rank has one connection to rank 0, which carries JSON and, where states move, the bytes
of arrays; nothing that could run. ZeroMQ sends heartbeats on it, from a thread that neither Python
nor a stuck collective holds up: who was stopped or cut off is known within `SILENCE` seconds.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import zmq
import zmq.utils.monitor
from zmq.utils import z85

from mlx_kimi.errors import KimiError
from mlx_kimi.ranks.failure import end, terminal_here
from mlx_kimi.ranks.launched import SECRET, Launched

Message = dict[str, Any]
Arrays = dict[str, mx.array]

HEARTBEAT = 1000  # ms
SILENCE = 8  # seconds without a heartbeat, after which a rank is lost
JOINING = 120  # seconds that ranks wait for each other at the start
WAITED = 8  # seconds after which a person is told whom they wait for
LINGER = 2  # seconds that a last message may take
OPENED = zmq.Event.ACCEPTED, zmq.Event.CONNECTED
EVENTS = zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED | OPENED[0] | OPENED[1]
OTHER_BITS = {mx.bfloat16: mx.uint16}  # what numpy has no name for


class Control:
    """Of one rank. Threads take turns to send and receive."""

    def __init__(self, launched: Launched) -> None:
        """Rank 0 listens, the others connect, whoever comes first.

        Raises:
            KimiError: rank 0 cannot listen.
        """
        self.launched = launched
        self._terminal = None if launched.rank else terminal_here()
        self._context = zmq.Context()
        others = range(1, launched.size) if launched.rank == 0 else (0,)
        self._sockets = {peer: self._socket(peer) for peer in others}
        self._joined: set[int] = set()
        self._gone = {peer: threading.Event() for peer in others}
        self._ending = False
        self._turn = threading.Lock()
        monitors = {
            peer: socket.get_monitor_socket(EVENTS) for peer, socket in self._sockets.items()
        }
        for peer, socket in self._sockets.items():
            where = f"tcp://{launched.hosts[0]}:{launched.port + max(peer, launched.rank) - 1}"
            try:
                if launched.rank == 0:
                    socket.bind(where)
                else:
                    socket.connect(where)
            except zmq.ZMQError as error:
                raise KimiError(f"rank 0 cannot listen at {where}: {error}") from None
        threading.Thread(target=self._watch, args=(monitors,), daemon=True).start()
        atexit.register(self.close)

    def _socket(self, peer: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE * 1000)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.SNDHWM, 0)
        if self.launched.secret is not None:
            # Whoever has the secret has both keys: nobody else can listen, connect or read.
            public, private = _keys(self.launched.secret, "rank 0")
            if self.launched.rank == 0:
                socket.curve_server, socket.curve_secretkey = True, private
                socket.curve_publickey = public
            else:
                socket.curve_serverkey = public
                socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        return socket

    # ---------------------------------------------------------------------------------- messages
    def send(
        self, peer: int, message: Message, arrays: Mapping[str, mx.array] | None = None
    ) -> None:
        """Queue a message, with arrays that have been computed or will be here."""
        frames: list[Any] = []
        described = []
        for name, array in (arrays or {}).items():
            dtype = str(array.dtype).removeprefix("mlx.core.")
            described.append((name, dtype, array.shape))
            frames.append(np.array(array.view(OTHER_BITS.get(array.dtype, array.dtype))))
        head = json.dumps({**message, "arrays": described}).encode()
        with self._turn:
            self._sockets[peer].send_multipart([head, *frames])

    def broadcast(self, message: Message) -> None:
        """The same to all others."""
        for peer in self._sockets:
            self.send(peer, message)

    def receive(self, peer: int = 0) -> tuple[Message, Arrays]:
        """Wait for a message of `peer`."""
        with self._turn:
            head, *frames = self._sockets[peer].recv_multipart()
        message = json.loads(head)
        return message, {
            name: _array(frame, dtype, shape)
            for (name, dtype, shape), frame in zip(message.pop("arrays"), frames, strict=True)
        }

    def has_message(self, peer: int, seconds: float) -> bool:
        """Whether `peer` sends one within this time."""
        with self._turn:
            return bool(self._sockets[peer].poll(int(1000 * seconds)))

    # ------------------------------------------------------------------------------------ joining
    def first_messages(self, say: Any) -> dict[int, Message]:
        """At rank 0: what the others say of themselves, once all have joined.

        say: takes a line for a person who waits.

        Raises:
            KimiError: one does not come.
        """
        began, told, found = time.monotonic(), False, dict[int, Message]()
        while missing := self._sockets.keys() - found.keys():
            for peer in missing:
                if self.has_message(peer, 0.05):
                    found[peer], _ = self.receive(peer)
                    self._joined.add(peer)
            waited = time.monotonic() - began
            names = ", ".join(self.launched.name(peer) for peer in sorted(missing - found.keys()))
            if names and waited > WAITED and not told:
                say(f"waiting for {names}: start mlx_kimi there, with {self._must_agree()}")
                told = True
            if names and waited > JOINING:
                raise KimiError(
                    f"{names} did not join within {JOINING} seconds: start all ranks with "
                    f"{self._must_agree()}"
                )
        return found

    def _must_agree(self) -> str:
        return "the same hosts" + (f" and {SECRET}" if self.launched.secret else "")

    def introduce(self, message: Message) -> None:
        """At another rank: say who this is, and wait until rank 0 has heard it.

        Raises:
            KimiError: rank 0 does not answer.
        """
        self.send(0, message)
        if not self.has_message(0, JOINING):
            raise KimiError(
                f"{self.launched.name(0)} did not answer within {JOINING} seconds: start it with "
                f"{self._must_agree()}"
            )
        self._joined.add(0)

    # --------------------------------------------------------------------------------------- watch
    def _watch(self, monitors: Mapping[int, zmq.Socket[bytes]]) -> None:
        """End this process once a rank that had joined is lost.

        Strangers may knock at a port, and leave: they have another connection than the rank.
        """
        opened = dict.fromkeys(self._sockets, 0)  # the descriptor of the latest connection
        known: dict[int, int] = {}  # of the connection that has proved its keys
        poller = zmq.Poller()
        peers = {monitor: peer for peer, monitor in monitors.items()}
        for monitor in peers:
            poller.register(monitor, zmq.POLLIN)
        while True:
            for monitor, _ in poller.poll():
                event = zmq.utils.monitor.recv_monitor_message(monitor)
                peer, kind, descriptor = peers[monitor], event["event"], event["value"]
                if kind in OPENED:
                    opened[peer] = descriptor
                elif kind == zmq.Event.HANDSHAKE_SUCCEEDED:
                    if peer not in self._joined or peer not in known:
                        known[peer] = opened[peer]
                elif descriptor == known.get(peer):
                    self._has_lost(peer)

    def _has_lost(self, peer: int) -> None:
        self._gone[peer].set()
        if peer in self._joined and not self._ending:
            end(
                f"{self.launched.name(peer)} is lost to rank {self.launched.rank}: it ended, was "
                "stopped, or the connection broke; see what it said, and start all ranks again",
                self._terminal,
            )

    def wait_for_the_end(self) -> None:
        """A connection of the engine broke: whoever is lost, `_watch` says so and ends this."""
        time.sleep(SILENCE + 2)

    def close(self, failed: bool = False) -> None:
        """Tell the others that all is over; nobody is lost from then on."""
        if self._ending:
            return
        self._ending = True
        if self._turn.acquire(timeout=LINGER):  # (else a thread still waits for a reply)
            self._turn.release()
            for peer in self._joined if self.launched.rank == 0 else ():
                self.send(peer, {"do": "end", "failed": failed})
        for peer in self._joined:
            self._gone[peer].wait(LINGER)


def _keys(secret: str, of: str) -> tuple[bytes, bytes]:
    """The public and the private key that a secret stands for."""
    private = z85.encode(hashlib.sha256(f"{of} {secret}".encode()).digest())
    return zmq.curve_public(private), private


def _array(frame: bytes, dtype: str, shape: Sequence[int]) -> mx.array:
    kind: mx.Dtype = getattr(mx, dtype)
    bits = OTHER_BITS.get(kind, kind)
    name = str(bits).removeprefix("mlx.core.")
    return mx.array(np.frombuffer(frame, name).reshape(shape)).view(kind)
