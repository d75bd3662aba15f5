"""Floor 4. ZeroMQ between hub and clients: ROUTER at the hub, DEALER at each client, both ends here.

ZeroMQ promises nothing across a disconnect; spool, acknowledgements and Hello do. Every option and its
reason:

    LINGER 0             closing never waits: what is unacknowledged is on disk
    IMMEDIATE 1          no queue for a hub that is not there; sending waits instead
    HWM                  credit bounds the bytes on the way; the mark only bounds small messages
    MAXMSGSIZE           no frame is larger than the largest array
    HANDSHAKE_IVL 5 s    a stranger who connects and says nothing is dropped
    RECONNECT_IVL        100 ms, doubling to 10 s: many clients return without a stampede
    ROUTER_MANDATORY 1   sending to a peer that is gone is an error, not silence
    no ROUTER_HANDOVER   a stranger cannot take a name over; names are bound in Hello
    no heartbeats        a busy peer would be cut; pings of the protocol measure life
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import zmq
import zmq.asyncio

from slipstream.errors import AddressError, FrameError
from slipstream.messages import Ack, Buffer, Refused, decode_message, encode_message
from slipstream.transport.channel import Handler, Reply

MAX_FRAME_BYTES: Final = 32 << 20
MAX_FRAMES: Final = 16
_HIGH_WATER: Final = 4096
_MOST_PER_TURN: Final = 128
_POLL_MS: Final = 50
_COPY_BELOW: Final = 16 << 10


class RouterServer:
    """The hub's end: takes messages in turns, makes them durable together, then answers.

    Example: ``server = RouterServer(ledger, "tcp://127.0.0.1:*"); server.run(lambda: stopping)``.
    """

    def __init__(
        self, handler: Handler, address: str, *, lost: Callable[[bytes], None] = lambda _: None
    ) -> None:
        """Bind; raises AddressError when the address is in use or not valid."""
        self._handler, self._lost = handler, lost
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, _HIGH_WATER),
            (zmq.RCVHWM, _HIGH_WATER),
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
            (zmq.HANDSHAKE_IVL, 5000),
            (zmq.ROUTER_MANDATORY, 1),
        ):
            self._socket.setsockopt(option, value)
        self.address = self._bind(address)
        self.malformed = 0
        """Messages that were none."""

    def run(self, stopping: Callable[[], bool], *, each_turn: Callable[[], None] = lambda: None) -> None:
        """Serve until `stopping()`; `each_turn` runs at least every 50 ms."""
        while not stopping():
            self.turn(_POLL_MS)
            each_turn()

    def turn(self, timeout_ms: int) -> None:
        """Wait for messages, handle all that are there, flush once, answer."""
        replies: list[Reply] = []
        if self._socket.poll(timeout_ms):
            replies = self._take_all()
        replies += self._handler.tick(time.monotonic())
        self._handler.flush()
        self._send_all(replies)

    def close(self) -> None:
        """Release the address."""
        self._context.destroy(linger=0)

    def _bind(self, address: str) -> str:
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise AddressError(
                f"hub.address: cannot bind {address} ({zmq.strerror(error.errno or 0)}); stop whoever "
                f"uses it, or set "
                f"another address (tcp://127.0.0.1:* takes a free port)"
            ) from error
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _take_all(self) -> list[Reply]:
        replies: list[Reply] = []
        for _ in range(_MOST_PER_TURN):
            try:
                peer, *frames = receive_frames(self._socket)
            except zmq.Again:
                break
            replies += self._take(bytes(peer), frames)
        return replies

    def _take(self, peer: bytes, frames: Sequence[Buffer]) -> list[Reply]:
        try:
            if not 1 <= len(frames) <= MAX_FRAMES:
                raise FrameError(f"message: expected 1 to {MAX_FRAMES} frames, got {len(frames)}")
            message = decode_message(frames[0])
        except FrameError as error:
            self.malformed += 1
            return [(peer, Refused(reason=str(error)), ())]
        return self._handler.handle(peer, message, frames[1:], time.monotonic())

    def _send_all(self, replies: Sequence[Reply]) -> None:
        for peer, message, frames in merge_acks(replies):
            try:
                self._socket.send_multipart([peer, encode_message(message), *frames], zmq.NOBLOCK, copy=False)
            except zmq.ZMQError as error:
                # Gone, or it has not read thousands of messages: it must say Hello again.
                if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                    raise
                self._lost(peer)


class DealerChannel:
    """An actor's end, for asyncio."""

    def __init__(self, address: str) -> None:
        """Connect in the background; raises AddressError for an address that cannot be one."""
        self.address = address
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        _connect(self._context, self._socket, address)

    async def send(self, frames: Sequence[Buffer]) -> None:
        """Hand one message over; waits while no hub is connected."""
        await self._socket.send_multipart(frames, copy=_is_small(frames))

    async def receive(self) -> list[Buffer]:
        """Return the next message."""
        frames: list[Buffer] = list(await self._socket.recv_multipart())
        return frames

    def close(self) -> None:
        """Drop the connection."""
        self._context.destroy(linger=0)


class SyncDealerChannel:
    """The learner's end."""

    def __init__(self, address: str) -> None:
        """Connect in the background; raises AddressError for an address that cannot be one."""
        self.address = address
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        _connect(self._context, self._socket, address)

    def send(self, frames: Sequence[Buffer], timeout_s: float) -> bool:
        """Hand one message over; returns False when no hub was connected in time."""
        if not self._socket.poll(int(timeout_s * 1000), zmq.POLLOUT):
            return False
        self._socket.send_multipart(frames, zmq.NOBLOCK)
        return True

    def receive(self, timeout_s: float) -> list[Buffer] | None:
        """Return the next message, or None when there is none in time."""
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        return receive_frames(self._socket)

    def close(self) -> None:
        """Drop the connection."""
        self._context.destroy(linger=0)


def receive_frames(socket: zmq.Socket[Any]) -> list[Buffer]:
    """Return one message, large frames not copied; raises zmq.Again when there is none."""
    frames: list[Buffer] = []
    for frame in socket.recv_multipart(zmq.NOBLOCK, copy=False):
        frames.append(frame.bytes if len(frame) < _COPY_BELOW else frame.buffer)
    return frames


def merge_acks(replies: Sequence[Reply]) -> list[Reply]:
    """Return the replies with all acknowledgements of a peer in one."""
    merged: dict[bytes, Ack] = {}
    others: list[Reply] = []
    for peer, message, frames in replies:
        if isinstance(message, Ack):
            known = merged.get(peer, Ack(seqs=(), bytes=0))
            merged[peer] = Ack(seqs=known.seqs + message.seqs, bytes=known.bytes + message.bytes)
        else:
            others.append((peer, message, frames))
    return [*((peer, ack, ()) for peer, ack in merged.items()), *others]


def _is_small(frames: Sequence[Buffer]) -> bool:
    return sum(map(len, frames)) < _COPY_BELOW * len(frames)


def _connect(context: zmq.Context[Any], socket: zmq.Socket[Any], address: str) -> None:
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.IMMEDIATE, 1),
        (zmq.SNDHWM, _HIGH_WATER),
        (zmq.RCVHWM, _HIGH_WATER),
        (zmq.HANDSHAKE_IVL, 5000),
        (zmq.RECONNECT_IVL, 100),
        (zmq.RECONNECT_IVL_MAX, 10_000),
    ):
        socket.setsockopt(option, value)
    try:
        socket.connect(address)
    except zmq.ZMQError as error:
        context.destroy(linger=0)
        raise AddressError(
            f"cannot connect to a hub at {address} ({zmq.strerror(error.errno or 0)}); expected "
            f"tcp://HOST:PORT or "
            f"ipc://PATH"
        ) from error
