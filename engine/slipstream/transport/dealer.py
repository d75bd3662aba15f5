"""Floor 4. The clients' ends of the wire: for asyncio and for the learner's synchronous loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from slipstream.errors import AddressError, RefusedError, SlipstreamError
from slipstream.keys import ClientKeys
from slipstream.messages import Buffer
from slipstream.transport.channel import nothing
from slipstream.transport.sockets import receive_frames, send_frames, set_dealer_options

_EVENTS, _IN, _OUT = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.POLLOUT)
# Plain integers: one operation on an enum's flags takes longer than a call of libzmq.
_UNEXPLAINED: Final = 10
_WITHIN_S: Final = 20.0
"""So many handshakes ended without a reason in so short a time mean refusal; a hub that has too much to do
lets each one take HANDSHAKE_IVL, 5 s."""
_MISMATCH: Final = int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH)
_WATCHED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_SUCCEEDED
)  # fmt: skip


class _Connection:
    """A DEALER socket and what its handshakes come to, of which libzmq itself says nothing."""

    def __init__(self, address: str, keys: ClientKeys | None) -> None:
        self._address, self._keys = address, keys
        self.made = 0
        """How often the connection was made; libzmq makes it anew when it breaks."""
        self._unexplained: deque[float] = deque(maxlen=_UNEXPLAINED)
        self.context = zmq.Context()
        self.socket: zmq.Socket[bytes] = self.context.socket(zmq.DEALER)
        try:
            set_dealer_options(self.socket, keys)
            self.monitor: zmq.Socket[bytes] = self.socket.get_monitor_socket(int(_WATCHED))
            self.socket.connect(address)
        except zmq.ZMQError as error:
            self.context.destroy(linger=0)
            raise AddressError(
                f"cannot connect to a hub at {address} ({zmq.strerror(error.errno or 0)}); expected "
                f"tcp://HOST:PORT or "
                f"ipc://PATH"
            ) from error

    def remade(self) -> bool:
        """Return whether the connection was made anew since the last call.

        Raises RefusedError or AddressError once a handshake shows that no other one can end well.
        """
        before = self.made
        while int(self.monitor.getsockopt(_EVENTS)) & _IN:
            event = parse_monitor_message(self.monitor.recv_multipart())
            failure = self._failure(int(event["event"]), int(event["value"]))
            if failure is not None:
                raise failure
        return self.made > max(1, before)

    def _failure(self, kind: int, value: int) -> SlipstreamError | None:
        hub, keys = f"the hub at {self._address}", self._keys
        match kind:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.made += 1
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH if keys is not None:
                return RefusedError(
                    f"{hub} refused the key in {keys.file}: it is not in the hub's allow-list; put "
                    f"authorized/{keys.file.stem}.toml, made beside it, into the hub's folder hub.keys"
                )
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL if value != _MISMATCH:
                return AddressError(f"{hub} is none: expected its half of a handshake, got error {value:#x}")
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                return self._mismatch(hub)
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL if not self.made:
                # A hub that closes fast enough is gone before its half of the handshake is read.
                self._unexplained.append(time.monotonic())
                quick = self._unexplained[-1] - self._unexplained[0] < _WITHIN_S
                if quick and len(self._unexplained) == _UNEXPLAINED:
                    return self._mismatch(hub)
        return None

    def _mismatch(self, hub: str) -> RefusedError:
        if self._keys is None:
            return RefusedError(
                f"{hub} lets only known keys in; set hub.keys to the folder with this client's key "
                f"(`slipstream keys` makes one)"
            )
        return RefusedError(
            f"{hub} is not the one whose public key is in {self._keys.file}, or uses no keys; give both ends "
            f"hub.keys, with files made in one folder"
        )


class DealerChannel:
    """An actor's end, for asyncio: nothing is waited for that is possible at once."""

    def __init__(self, address: str, keys: ClientKeys | None = None) -> None:
        """Connect in the background; raises AddressError for an address that cannot be one.

        Sending and receiving raise RefusedError once the hub has turned this client away at the door.
        """
        self.address = address
        self.remade: Callable[[], None] = nothing
        self._connection = _Connection(address, keys)
        self._socket = self._connection.socket
        self._loop: asyncio.AbstractEventLoop | None = None
        self._readable, self._writable = asyncio.Event(), asyncio.Event()
        self._failure: SlipstreamError | None = None
        self._looks = False
        """Whether a look at the socket is due in this turn of the loop."""

    def send_now(self, frames: Sequence[Buffer]) -> bool:
        """Hand one message over; returns False while no hub is connected."""
        try:
            send_frames(self._socket, frames)
        except zmq.Again:
            return False
        finally:
            self._look_soon()
        return True

    def receive_now(self) -> list[Buffer] | None:
        """Return the next message, or None when there is none."""
        try:
            return receive_frames(self._socket)
        except zmq.Again:
            return None
        finally:
            self._look_soon()

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
            self._loop.remove_reader(self._connection.monitor.fileno())
        self._connection.context.destroy(linger=0)

    async def _wait(self, ready: asyncio.Event) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket.fileno(), self._look)
            self._loop.add_reader(self._connection.monitor.fileno(), self._look_at_handshakes)
        ready.clear()
        self._look()
        self._look_at_handshakes()
        await ready.wait()
        if self._failure is not None:
            raise self._failure

    def _look_soon(self) -> None:
        """Look once for all calls of this turn of the loop: nobody runs before it ends."""
        if not self._looks:
            self._looks = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        """Wake whoever the socket is ready for.

        Its descriptor tells of changes only, and any call on the socket may swallow one: so this runs when
        the descriptor stirs, after each turn with such calls, and before each wait.
        """
        self._looks = False
        if self._socket.closed:
            return
        events = int(self._socket.getsockopt(_EVENTS))
        if events & _IN:
            self._readable.set()
        if events & _OUT:
            self._writable.set()

    def _look_at_handshakes(self) -> None:
        """Tell of a connection that was made anew, and wake everybody when this client was turned away."""
        try:
            if self._connection.remade():
                self.remade()
        except (AddressError, RefusedError) as error:
            self._failure = error
        if self._failure is not None:
            self._readable.set()
            self._writable.set()


class SyncDealerChannel:
    """The learner's end."""

    def __init__(self, address: str, keys: ClientKeys | None = None) -> None:
        """Connect in the background; raises AddressError for an address that cannot be one.

        Sending and receiving raise RefusedError once the hub has turned this client away at the door.
        """
        self.address = address
        self.remade: Callable[[], None] = nothing
        self._connection = _Connection(address, keys)
        self._socket = self._connection.socket

    def send(self, frames: Sequence[Buffer], timeout_s: float) -> bool:
        """Hand one message over; returns False when no hub was connected in time."""
        end = time.monotonic() + timeout_s
        while self._poll(_OUT, max(0.0, end - time.monotonic())):
            try:
                send_frames(self._socket, frames)
            except zmq.Again:
                continue  # The connection went between the two.
            return True
        return False

    def receive(self, timeout_s: float) -> list[Buffer] | None:
        """Return the next message, or None when there is none in time."""
        return receive_frames(self._socket) if self._poll(_IN, timeout_s) else None

    def close(self) -> None:
        """Drop the connection."""
        self._connection.context.destroy(linger=0)

    def _poll(self, events: int, timeout_s: float) -> bool:
        """Return whether the socket became ready in time."""
        poller = zmq.Poller()
        poller.register(self._socket, events)
        poller.register(self._connection.monitor, _IN)
        end = time.monotonic() + timeout_s
        while True:
            ready: dict[Any, int] = dict(poller.poll(max(0, int(1000 * (end - time.monotonic())))))
            if self._socket in ready:
                return True
            if self._connection.remade():
                self.remade()
            if time.monotonic() >= end:
                return False
