"""Floor 4. The hub's end of the wire: messages in turns, made durable together, then answered."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Final

import zmq

from slipstream.errors import AddressError, DamageError, FrameError
from slipstream.flight_recorder import FLIGHT
from slipstream.keys import AllowList, HubKeys
from slipstream.messages import Ack, Buffer, Hello, Refused, Welcome, decode_message, encode_message
from slipstream.transport.channel import Handler, Reply
from slipstream.transport.door import Door
from slipstream.transport.guard import ConnectionGuard, Limits
from slipstream.transport.ipc_path import PathLease
from slipstream.transport.sockets import MAX_FRAMES, receive_with_last, send_frames, set_router_options

_MOST_PER_TURN: Final = 128
_POLL_MS: Final = 50


class RouterServer:
    """The hub's end: takes messages in turns, makes them durable together, then answers.

    With keys, only clients of the allow-list come in, and each only under its own name: their messages carry
    "role/name" of the key, and to the handler a peer is that user together with its connection.

    Example: ``server = RouterServer(ledger, "tcp://127.0.0.1:*"); server.run(lambda: stopping)``.
    """

    def __init__(
        self,
        handler: Handler,
        address: str,
        *,
        lost: Callable[[bytes], None] = lambda _: None,
        keys: HubKeys | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Bind; raises AddressError when the address is in use or not valid, ConfigurationError for keys."""
        self._handler, self._lost, self._keyed = handler, lost, keys is not None
        allowed = None if keys is None else AllowList(keys.authorized)
        self._lease = PathLease(address)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._guard = ConnectionGuard(limits or Limits())
        set_router_options(self._socket, keys)
        self._door = Door(self._context, self._socket, self._guard, allowed)
        try:
            self.address = self._bind(address)
        except AddressError:
            self.close()
            raise
        self.malformed = 0
        """Messages that were none."""
        self.refused_hellos = 0
        """Hellos of another run, protocol or schema, or under a name that is not their key's."""

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
        while self._guard.notes:
            note = self._guard.notes.popleft()
            FLIGHT.note(note)
            sys.stderr.write(f"hub: {note}\n")

    def counters(self) -> dict[str, int]:
        """Return what was turned away and how many connections stand, for status.json."""
        return {
            "connections": len(self._guard),
            "cut_connections": self._guard.cut,
            "refused_handshakes": self._guard.unheard,
            "refused_keys": self._door.refused_keys,
            "refused_hellos": self.refused_hellos,
            "malformed_messages": self.malformed,
        }

    def close(self) -> None:
        """Release the address."""
        self._door.close()
        self._context.destroy(linger=0)
        self._lease.release()

    def _bind(self, address: str) -> str:
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
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
                (routing, *frames), last = receive_with_last(self._socket, most=MAX_FRAMES + 2)
            except zmq.Again:
                break
            descriptor, user = self._origin(last)
            self._guard.delivered(descriptor, len(frames), sum(map(len, frames)))
            peer = user.encode() + b"\0" + bytes(routing) if self._keyed else bytes(routing)
            replies += self._take(peer, user, frames, descriptor)
        return replies

    def _origin(self, frame: zmq.Frame) -> tuple[int, str]:
        """Return the connection and the user of a frame, as libzmq tells them."""
        return int(frame.get(zmq.SRCFD)), str(frame.get("User-Id")) if self._keyed else ""

    def _take(self, peer: bytes, user: str, frames: Sequence[Buffer], descriptor: int) -> list[Reply]:
        try:
            if not 1 <= len(frames) <= MAX_FRAMES:
                raise DamageError(f"message: expected 1 to {MAX_FRAMES} frames, got {len(frames)}")
            message = decode_message(frames[0])
        except FrameError as error:
            self.malformed += 1
            self._guard.blame(descriptor)
            # A client that is told so says Hello, and everything that is open once more.
            return [(peer, Refused(reason=str(error), retry=isinstance(error, DamageError)), ())]
        if isinstance(message, Hello):
            return self._greet(peer, user, message, descriptor)
        return self._handler.handle(peer, message, frames[1:], time.monotonic())

    def _greet(self, peer: bytes, user: str, hello: Hello, descriptor: int) -> list[Reply]:
        """Let the handler judge a Hello, if it is said under the name of its key."""
        claimed = f"{hello.role}/{hello.name}"
        if self._keyed and claimed != user:
            reason = f"name: its key is that of {user}, not of {claimed}"
            replies: list[Reply] = [(peer, Refused(reason=reason), ())]
        else:
            replies = self._handler.handle(peer, hello, (), time.monotonic())
        if any(reply[0] == peer and isinstance(reply[1], Welcome) for reply in replies):
            self._guard.admit(descriptor)
        else:
            self.refused_hellos += 1
            self._guard.blame(descriptor)
        return replies

    def _send_all(self, replies: Sequence[Reply]) -> None:
        for peer, message, frames in merge_acks(replies):
            routing = peer.partition(b"\0")[2] if self._keyed else peer
            try:
                send_frames(self._socket, [routing, encode_message(message), *frames])
            except zmq.ZMQError as error:
                # Gone, or it has not read thousands of messages: it must say Hello again.
                if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                    raise
                self._lost(peer)


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
