"""Strangers who speak raw TCP to a hub: each class of attack in a few lines, in processes of their own.

ZMTP 3.1 by hand (rfc.zeromq.org/spec/37): a greeting of 64 bytes, a READY command, then frames of a flag byte
(1 = more follow, 2 = eight bytes of length instead of one, 4 = a command), a length and a body.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MORE, LONG, COMMAND = 1, 2, 4
SOURCES = [str(Path(__file__).parents[2] / name) for name in ("engine", "kernels")]


def greeting(*, major: int = 3, mechanism: bytes = b"NULL") -> bytes:
    """Return the first 64 bytes of a peer."""
    return b"\xff" + bytes(8) + b"\x7f" + bytes([major, 1]) + mechanism.ljust(20, b"\0") + bytes(32)


def ready() -> bytes:
    """Return the command that ends a NULL handshake."""
    pairs = ((b"Socket-Type", b"DEALER"), (b"Identity", b""))
    body = b"\x05READY" + b"".join(
        bytes([len(name)]) + name + struct.pack(">I", len(value)) + value for name, value in pairs
    )
    return bytes([COMMAND, len(body)]) + body


def frame(body: bytes, *, more: bool = False) -> bytes:
    """Return one frame of a message."""
    if len(body) < 256:
        return bytes([MORE * more, len(body)]) + body
    return bytes([MORE * more | LONG]) + struct.pack(">Q", len(body)) + body


def connect(address: str) -> socket.socket:
    """Return a TCP connection to a hub."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def shake_hands(connection: socket.socket) -> None:
    """Say what a peer without keys says before its first message; nobody waits for the hub's part of it."""
    connection.sendall(greeting() + ready())


def shake_hands_in_turn(connection: socket.socket) -> None:
    """Do so as a real peer does: libzmq may end a connection that runs ahead of its handshake."""
    connection.sendall(greeting())
    _receive(connection, 64)
    connection.sendall(ready())
    _receive(connection, _receive(connection, 2)[1])


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        assert more, f"expected {size} bytes of a handshake, got {data!r}"
        data += more
    return data


def ended(connection: socket.socket, seconds: float) -> bool:
    """Return whether the hub ends a connection in time; whatever else it says is read over."""
    connection.settimeout(seconds)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if not connection.recv(1 << 16):
                return True
        except TimeoutError:
            return False
        except OSError:
            return True
    return False


def endless(address: str, size: int) -> None:
    """Send one message of frames without end, again on a new connection whenever the hub ends one."""
    some = frame(bytes(size), more=True) * max(1, (256 << 10) // (size + 2))
    while True:
        with contextlib.suppress(OSError), connect(address) as connection:
            shake_hands(connection)
            connection.settimeout(1.0)  # an end that the hub's full window hides
            while True:
                connection.sendall(some)


def idle(address: str, count: int, kind: str) -> None:
    """Keep `count` connections open that say nothing, or ("polite") nothing after their handshake."""
    connections: list[socket.socket] = []
    while True:
        while len(connections) < count:
            with contextlib.suppress(OSError):
                connection = connect(address)
                if kind == "polite":
                    shake_hands(connection)
                connections.append(connection)
        _announce(count)
        connections = [connection for connection in connections if not ended(connection, 0.001)]


def garbage(address: str, count: int, seed: int) -> None:
    """Make `count` connections that say random bytes, or a handshake and random frames; then end."""
    dice = random.Random(seed)
    for _ in range(count):
        with contextlib.suppress(OSError), connect(address) as connection:
            if dice.random() < 0.5:
                shake_hands(connection)
                connection.sendall(frame(dice.randbytes(dice.randrange(300))))
            else:
                connection.sendall(dice.randbytes(dice.randrange(1, 300)))
    _announce(count)


def _announce(count: int) -> None:
    """Tell the test, once, that all connections were made."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(f"{count}\n")
        sys.stdout.flush()


@contextlib.contextmanager
def attacking(kind: str, address: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run an attack in a process of its own; its first line says that all its connections were made."""
    command = [sys.executable, __file__, kind, address, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def resident(pid: int) -> int:
    """Return the memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    os.nice(19)  # attackers bring machines of their own: here they must not take the hub's
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    what, where, *rest = sys.argv[1:]
    match what:
        case "endless":
            endless(where, int(rest[0]))
        case "idle":
            idle(where, int(rest[0]), rest[1])
        case "garbage":
            garbage(where, int(rest[0]), int(rest[1]))
