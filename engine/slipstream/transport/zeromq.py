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

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import zmq

from slipstream.errors import AddressError, DamageError, FrameError
from slipstream.messages import Ack, Buffer, Refused, decode_message, encode_message
from slipstream.transport.channel import Handler, Reply

MAX_FRAME_BYTES: Final = 32 << 20
MAX_FRAMES: Final = 16
HIGH_WATER: Final = 4096
_MOST_PER_TURN: Final = 128
_POLL_MS: Final = 50
_COPY_BELOW: Final = 512 << 10
"""Copying a smaller frame to libzmq costs less than sharing it, which a thread of pyzmq keeps count of."""
_BYTES_BELOW: Final = 4 << 10
"""Copying a smaller frame out of libzmq costs less than a view of it."""
_NOW: Final = int(zmq.NOBLOCK)
_NOT_LAST: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS, _IN, _OUT = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.POLLOUT)
# Plain integers: one operation on an enum's flags takes longer than a call of libzmq.


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
            (zmq.SNDHWM, HIGH_WATER),
            (zmq.RCVHWM, HIGH_WATER),
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
        now = time.monotonic()
        replies += [*self._handler.progress(now), *self._handler.tick(now)]
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
                raise DamageError(f"message: expected 1 to {MAX_FRAMES} frames, got {len(frames)}")
            message = decode_message(frames[0])
        except FrameError as error:
            self.malformed += 1
            # A client that is told so says Hello, and everything that is open once more.
            return [(peer, Refused(reason=str(error), retry=isinstance(error, DamageError)), ())]
        return self._handler.handle(peer, message, frames[1:], time.monotonic())

    def _send_all(self, replies: Sequence[Reply]) -> None:
        for peer, message, frames in merge_acks(replies):
            try:
                send_frames(self._socket, [peer, encode_message(message), *frames])
            except zmq.ZMQError as error:
                # Gone, or it has not read thousands of messages: it must say Hello again.
                if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                    raise
                self._lost(peer)


class DealerChannel:
    """An actor's end, for asyncio: nothing is waited for that is possible at once."""

    def __init__(self, address: str) -> None:
        """Connect in the background; raises AddressError for an address that cannot be one."""
        self.address = address
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        _connect(self._context, self._socket, address)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._readable, self._writable = asyncio.Event(), asyncio.Event()

    def send_now(self, frames: Sequence[Buffer]) -> bool:
        """Hand one message over; returns False while no hub is connected."""
        try:
            send_frames(self._socket, frames)
        except zmq.Again:
            return False
        finally:
            self._look()
        return True

    def receive_now(self) -> list[Buffer] | None:
        """Return the next message, or None when there is none."""
        try:
            return receive_frames(self._socket)
        except zmq.Again:
            return None
        finally:
            self._look()

    async def send(self, frames: Sequence[Buffer]) -> None:
        """Hand one message over; waits while no hub is connected."""
        while not self.send_now(frames):
            await self._wait(self._writable)

    async def receive(self) -> list[Buffer]:
        """Return the next message."""
        while (frames := self.receive_now()) is None:
            await self._wait(self._readable)
        return frames

    def close(self) -> None:
        """Drop the connection."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._socket.fileno())
        self._context.destroy(linger=0)

    async def _wait(self, ready: asyncio.Event) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket.fileno(), self._look)
        ready.clear()
        self._look()
        await ready.wait()

    def _look(self) -> None:
        """Wake whoever the socket is ready for.

        Its descriptor tells of changes only, and any call on the socket may swallow one: so this runs when
        the descriptor stirs, after each call, and before each wait.
        """
        events = int(self._socket.getsockopt(_EVENTS))
        if events & _IN:
            self._readable.set()
        if events & _OUT:
            self._writable.set()


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
        send_frames(self._socket, frames)
        return True

    def receive(self, timeout_s: float) -> list[Buffer] | None:
        """Return the next message, or None when there is none in time."""
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        return receive_frames(self._socket)

    def close(self) -> None:
        """Drop the connection."""
        self._context.destroy(linger=0)


def send_frames(socket: zmq.Socket[Any], frames: Sequence[Buffer]) -> None:
    """Hand one message over, large frames not copied; raises zmq.Again when no peer takes it now."""
    for number, frame in enumerate(frames[:-1]):
        try:
            socket.send(frame, _NOT_LAST, copy=len(frame) < _COPY_BELOW)
        except zmq.Again:
            if number:
                # The peer is gone: libzmq drops frames up to a last one, and must not drop the next message.
                socket.send(b"", _NOW)
            raise
    socket.send(frames[-1], _NOW, copy=len(frames[-1]) < _COPY_BELOW)


def receive_frames(socket: zmq.Socket[Any]) -> list[Buffer]:
    """Return one message, large frames not copied; raises zmq.Again when there is none."""
    frames: list[Buffer] = []
    while True:
        frame = socket.recv(_NOW, copy=False)
        frames.append(frame.bytes if len(frame) < _BYTES_BELOW else frame.buffer)
        if not frame.more:
            return frames


def merge_acks(replies: Sequence[Reply]) -> list[Reply]:
    """Return the replies with all acknowledgements of a peer in one, behind everything else.

    A client forgets a lease with its acknowledgement: a Grant said again after its Hello must not come later.
    """
    merged: dict[bytes, list[Ack]] = {}
    others: list[Reply] = []
    for reply in replies:
        if isinstance(reply[1], Ack):
            merged.setdefault(reply[0], []).append(reply[1])
        else:
            others.append(reply)
    for peer, acks in merged.items():
        seqs = tuple(seq for ack in acks for seq in ack.seqs)
        others.append((peer, Ack(seqs=seqs, bytes=sum(ack.bytes for ack in acks)), ()))
    return others


def _connect(context: zmq.Context[Any], socket: zmq.Socket[Any], address: str) -> None:
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.IMMEDIATE, 1),
        (zmq.SNDHWM, HIGH_WATER),
        (zmq.RCVHWM, HIGH_WATER),
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
