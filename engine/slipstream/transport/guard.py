"""Floor 4. Connections of the hub, each bounded: what it may hold, how long it may stay unknown.

libzmq bounds a frame, but not the frames of a message, nor how many peers stand at the door. The kernel
counts the bytes that came in over a connection, the hub those of the messages it took from it; the
difference is what the connection holds in memory. An honest peer never has more than its credit and one
record on the way.

    a connection is cut when it             bound
    holds too much                          `outstanding_bytes`
    has said no Hello that was let in       `hello_s` after it came
    sent messages that are none             `malformed`
    is the oldest unknown of too many       `connections` in all
    is unknown and holds anything much      while the process is above `stranger_memory_bytes`
    holds most of all                       while the process is above `memory_bytes`

Cutting resets the TCP connection and drops what the kernel still holds of it, of which libzmq would make up
to 32 times as much (64 bytes for an empty frame of two); libzmq then ends it as if the peer had left, and
frees its unfinished message. Unix domain sockets have no such counter: there the folder keeps strangers out.

What counts is how soon: a stranger fills a gigabyte in a second. So while one is there, memory is looked at
every few milliseconds, and asking the kernel about each of a thousand connections does not hand the
interpreter's lock to a busy thread, which might keep it for milliseconds each time.
"""

from __future__ import annotations

import ctypes
import math
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from slipstream.process import MemoryGauge
from slipstream.transport.sockets import CURVE_FRAME_BYTES

_TCP_INFO_BYTES: Final = 136
_BYTES_RECEIVED: Final = struct.Struct("<Q"), 128
"""tcpi_bytes_received in struct tcp_info of linux/tcp.h; it never moves."""
_COOKIE: Final = struct.Struct("<Q")
_TCP_INFO: Final = 11
_LIBC: Final = ctypes.CDLL(None)
_LIBC_LOCKED: Final = ctypes.PyDLL(None)
"""For calls that take a microsecond: the interpreter's lock is kept."""
_UNSPECIFIED: Final = bytes(16)
"""A struct sockaddr of family AF_UNSPEC."""
_SO_COOKIE: Final = 57
"""A number the kernel gives no other socket until the machine restarts."""
_MUCH_BYTES: Final = 64 << 10
_GROWN_BYTES: Final = 8 << 20
_TRIM_EVERY_S: Final = 1.0
_TRIM_FOR_S: Final = 30.0
"""On a busy machine libzmq takes its time to free what a cut connection held."""
_MOST_NAMED: Final = 1024
_SELDOM_S: Final = 0.05
_OFTEN_S: Final = 0.005
_LEAST_REST: Final = 9.0
"""Seconds between two looks at all connections for each second that one takes: a tenth of a core at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of the guard."""

    outstanding_bytes: int = 48 << 20
    connections: int = 4096
    hello_s: float = 30.0
    malformed: int = 8
    stranger_memory_bytes: int = 1 << 30
    memory_bytes: int = 3 << 29


@dataclass(slots=True, kw_only=True, eq=False)
class Connection:
    """One accepted connection."""

    descriptor: int
    cookie: int
    address: str
    since_s: float
    delivered: int = 0
    """Bytes of whole messages taken from it, each frame with more than its overhead on the wire."""
    forgiven: int = 0
    """Keeps that generous count from ever exceeding what came in."""
    outstanding: int = 0
    malformed: int = 0
    admitted: bool = False
    cut: bool = False


class ConnectionGuard:
    """Follows every connection; one thread calls `delivered`, `admit` and `blame`, another one the rest.

    Descriptors are numbers that the system uses again: before anything is done to one, its cookie shows that
    it still is the connection it was. A message that outlived its connection counts for the next one with its
    number; that can only be too kind to it, or cost it a reconnection.
    """

    def __init__(self, limits: Limits, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Follow nothing yet."""
        self._limits, self._clock = limits, clock
        self._connections: dict[int, Connection] = {}
        self._named: set[str] = set()
        self._trimmed_s, self._cut_s = 0.0, -math.inf
        """When memory was last given back, and when a connection was last cut."""
        self._check_s = -math.inf
        """When all connections are to be looked at again."""
        self._unknown = False
        """Whether anybody may be there who was not admitted."""
        self._memory, self._resident = MemoryGauge(), 0
        """And what it showed when all connections were looked at."""
        self.cut = 0
        """Connections that were ended."""
        self.unheard = 0
        """Connections that ended before a message came: by a wrong key, none, another protocol, silence."""
        self.notes: deque[str] = deque(maxlen=64)
        """Sentences for the log, one for each address."""

    def __len__(self) -> int:
        """Return the number of open connections."""
        return len(self._connections)

    @property
    def look_every_s(self) -> float:
        """How long `look` may wait until it is called again."""
        return _OFTEN_S if self._unknown else _SELDOM_S

    def accepted(self, descriptor: int) -> None:
        """Follow a new connection."""
        self._unknown = True
        peer = _peer_of(descriptor)
        if peer is None:  # over before it could be looked at
            self.unheard += 1
            return
        cookie, address = peer
        self._connections[descriptor] = Connection(
            descriptor=descriptor, cookie=cookie, address=address, since_s=self._clock()
        )

    def gone(self, descriptor: int) -> None:
        """Forget a connection that has ended."""
        connection = self._connections.pop(descriptor, None)
        if connection is not None and not (connection.cut or connection.delivered):
            self.unheard += 1

    def delivered(self, descriptor: int, frames: int, size: int) -> None:
        """Count a whole message that was taken from a connection."""
        connection = self._connections.get(descriptor)
        if connection is not None:
            connection.delivered += size + frames * CURVE_FRAME_BYTES

    def admit(self, descriptor: int) -> None:
        """Let a connection stay: its Hello was good."""
        connection = self._connections.get(descriptor)
        if connection is not None:
            connection.admitted = True

    def blame(self, descriptor: int) -> None:
        """Count a message of a connection that was none, or that it may never send."""
        connection = self._connections.get(descriptor)
        if connection is not None:
            connection.malformed += 1

    def look(self) -> None:
        """Check once it is time to, or as soon as strangers fill the memory."""
        now = self._clock()
        if now >= self._check_s or (self._unknown and self._filling()):
            self.check()
            self._check_s = now + max(_SELDOM_S, _LEAST_REST * (self._clock() - now))

    def check(self) -> None:
        """Look at every connection and cut those that are out of bounds."""
        limits, now = self._limits, self._clock()
        for connection in self._open():
            _measure(connection)
            if connection.outstanding > limits.outstanding_bytes:
                self._cut(connection, f"it holds {connection.outstanding} bytes that are no whole message")
            elif connection.malformed >= limits.malformed:
                self._cut(connection, f"it sent {connection.malformed} messages that are none")
            elif not connection.admitted and now - connection.since_s > limits.hello_s:
                self._cut(connection, f"it said no valid Hello within {limits.hello_s:g} s")
        self._check_number()
        self._check_memory(now)
        self._unknown = any(not connection.admitted for connection in self._open())

    def _filling(self) -> bool:
        resident = self._memory.read().resident
        return resident > max(self._limits.stranger_memory_bytes, self._resident + _GROWN_BYTES)

    def _open(self) -> list[Connection]:
        return [connection for connection in self._connections.values() if not connection.cut]

    def _check_number(self) -> None:
        connections = self._open()
        strangers = [connection for connection in connections if not connection.admitted]
        strangers.sort(key=lambda connection: connection.since_s)
        for connection in strangers[: max(0, len(connections) - self._limits.connections)]:
            self._cut(connection, f"more than {self._limits.connections} connections, and it is unknown")

    def _check_memory(self, now: float) -> None:
        self._resident = self._memory.read().resident
        much = self._resident > self._limits.stranger_memory_bytes
        lately = now - self._cut_s < _TRIM_FOR_S
        if (much or lately) and now - self._trimmed_s > _TRIM_EVERY_S:
            self._trimmed_s = now
            give_memory_back()
            self._resident = self._memory.read().resident
        resident = self._resident
        holding = [connection for connection in self._open() if connection.outstanding > _MUCH_BYTES]
        if resident > self._limits.stranger_memory_bytes:
            for connection in holding:
                if not connection.admitted:
                    self._cut(connection, f"the hub holds {resident >> 20} MB, and it is unknown")
        if resident > self._limits.memory_bytes and holding:
            largest = max(holding, key=lambda connection: connection.outstanding)
            self._cut(largest, f"the hub holds {resident >> 20} MB, and its share is the largest")

    def _cut(self, connection: Connection, reason: str) -> None:
        if connection.cut:
            return
        connection.cut = True
        try:
            # A second descriptor holds whatever has this number now still while its cookie is compared.
            with socket.socket(fileno=os.dup(connection.descriptor)) as held:
                if _cookie_of(held) != connection.cookie:
                    return
                _reset(held)
        except OSError:
            return  # gone by itself
        self.cut += 1
        self._cut_s = self._clock()
        host = connection.address.rpartition(":")[0]
        if host not in self._named and len(self._named) < _MOST_NAMED:
            self._named.add(host)
            self.notes.append(f"cut the connection of {connection.address}: {reason}")


def give_memory_back() -> None:
    """Let glibc return what was freed to the system; elsewhere it does nothing."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


def _measure(connection: Connection) -> None:
    """Update what a connection holds; what it cannot tell stays as it was."""
    received = _received_by(connection.descriptor)
    if received is None:
        return
    held = received - connection.delivered + connection.forgiven
    if held < 0:
        connection.forgiven -= held
        held = 0
    connection.outstanding = held


def _received_by(descriptor: int) -> int | None:
    """Return the bytes that ever came in over a TCP connection, or None for anything else."""
    info, length = ctypes.create_string_buffer(_TCP_INFO_BYTES), ctypes.c_uint32(_TCP_INFO_BYTES)
    # Through ctypes: a socket object would ask the kernel three more questions, thousands of times a second.
    failed = _LIBC_LOCKED.getsockopt(descriptor, socket.IPPROTO_TCP, _TCP_INFO, info, ctypes.byref(length))
    if failed or length.value != _TCP_INFO_BYTES:
        return None
    layout, offset = _BYTES_RECEIVED
    return int(layout.unpack_from(info, offset)[0])


def _reset(connection: socket.socket) -> None:
    """End a connection, together with what came in over it and was not read; raises OSError if it is gone."""
    # Connecting to nowhere: the kernel's word for it, for TCP only, and not one of Python's.
    if _LIBC.connect(connection.fileno(), _UNSPECIFIED, len(_UNSPECIFIED)):
        connection.shutdown(socket.SHUT_RDWR)


def _peer_of(descriptor: int) -> tuple[int, str] | None:
    """Return (cookie, address) of a connection, or None when it is gone."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as held:
            if held.family == socket.AF_UNIX:
                return _cookie_of(held), "ipc:"
            host, port = held.getpeername()[:2]
            return _cookie_of(held), f"{host}:{port}"
    except OSError:
        return None


def _cookie_of(held: socket.socket) -> int:
    return int(_COOKIE.unpack(held.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, _COOKIE.size))[0])
