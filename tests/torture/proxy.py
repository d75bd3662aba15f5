"""A TCP proxy between clients and hub, in a process of its own, that does to bytes what networks do.

cut          both ends are closed
delay        a stretch of bytes waits for up to 100 ms
flip         one bit changes
truncate     the last bytes of a stretch vanish, and the connection with them
duplicate    a stretch comes twice
blackhole    nothing passes any more, for up to half a second; then the ends are closed
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import random
import socket
import struct
from pathlib import Path

FAULTS = ("cut", "delay", "flip", "truncate", "duplicate", "blackhole")
_CHUNK = 1 << 16


class Board:
    """Numbers that the proxy and whoever controls it share."""

    FIELDS = ("faulty", "heals", "connections", "bytes", *FAULTS)

    def __init__(self) -> None:
        """Start at zero."""
        self._map = mmap.mmap(-1, 8 * len(self.FIELDS))

    def __getitem__(self, name: str) -> int:
        """Return a number."""
        return int(struct.unpack_from("<q", self._map, 8 * self.FIELDS.index(name))[0])

    def __setitem__(self, name: str, value: int) -> None:
        """Set a number."""
        struct.pack_into("<q", self._map, 8 * self.FIELDS.index(name), value)

    def counts(self) -> dict[str, int]:
        """Return how often each fault was done."""
        return {name: self[name] for name in FAULTS}


class Connection:
    """One client's connection and the hub's other half of it."""

    def __init__(self, ends: list[asyncio.StreamWriter]) -> None:
        """Pass bytes between two ends."""
        self.ends = ends
        self.todo: list[str] = []
        self.silent = False
        """Nothing passes any more."""
        self.doomed = False
        """It ends behind what has passed."""

    def close(self) -> None:
        """Cut both ends, without a farewell."""
        for end in self.ends:
            end.transport.abort()


class Proxy:
    """Passes connections on to the hub of a run folder."""

    def __init__(self, folder: Path, board: Board, seed: int, rate: float, faults: tuple[str, ...]) -> None:
        """Do `rate` faults a second, of these kinds, while the board says so."""
        self._folder, self._board, self._rate, self._faults = folder, board, rate, faults
        self._random = random.Random(seed)
        self._live: list[Connection] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, listener: socket.socket) -> None:
        """Serve until killed."""
        server = await asyncio.start_server(self._accept, sock=listener)
        heals = 0
        async with server:
            while True:
                # Whoever plans the faults is asked often, so that it can stop them at once.
                await asyncio.sleep(self._random.expovariate(self._rate) if self._rate else 0.02)
                if self._board["heals"] != heals:
                    heals = self._board["heals"]
                    for connection in list(self._live):
                        connection.close()
                if self._board["faulty"] and self._rate and self._live and self._faults:
                    self._plan(self._random.choice(self._live), self._random.choice(self._faults))

    def _plan(self, connection: Connection, fault: str) -> None:
        if fault == "cut":
            self._count(fault)
            connection.close()
        elif fault == "blackhole":
            if not connection.silent:
                self._count(fault)
                connection.silent = True
                asyncio.get_running_loop().call_later(self._random.uniform(0.05, 0.5), connection.close)
        elif len(connection.todo) < 2:
            connection.todo.append(fault)

    def _count(self, fault: str) -> None:
        self._board[fault] += 1

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hub = await self._reach_hub()
        if hub is None:
            writer.transport.abort()
            return
        self._board["connections"] += 1
        connection = Connection([writer, hub[1]])
        self._live.append(connection)
        try:
            await asyncio.gather(
                self._pass(connection, reader, hub[1]), self._pass(connection, hub[0], writer)
            )
        finally:
            self._live.remove(connection)
            connection.close()

    async def _reach_hub(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        for _ in range(40):
            with contextlib.suppress(OSError, ValueError, KeyError):
                address = json.loads((self._folder / "hub.json").read_text())["address"]
                host, port = address.removeprefix("tcp://").rsplit(":", 1)
                return await asyncio.open_connection(host, int(port))
            await asyncio.sleep(0.025)
        return None

    async def _pass(
        self, connection: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                self._board["bytes"] += len(data)
                if connection.silent:
                    continue
                if connection.todo:
                    data = await self._harm(connection, connection.todo.pop(0), data)
                writer.write(data)
                await writer.drain()
                if connection.doomed:
                    break
        connection.close()

    async def _harm(self, connection: Connection, fault: str, data: bytes) -> bytes:
        self._count(fault)
        if fault == "delay":
            await asyncio.sleep(self._random.uniform(0.001, 0.1))
        elif fault == "flip":
            bit = self._random.randrange(8 * len(data))
            return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]
        elif fault == "duplicate":
            return data + data
        elif fault == "truncate":
            connection.doomed = True
            return data[: self._random.randrange(len(data))]
        return data


def listen() -> tuple[socket.socket, str]:
    """Return a socket that listens, and its address for clients."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    return listener, f"tcp://127.0.0.1:{listener.getsockname()[1]}"


def proxy_role(
    folder: Path, board: Board, listener: socket.socket, seed: int, rate: float, faults: tuple[str, ...]
) -> int:
    """Be the proxy."""
    asyncio.run(Proxy(folder, board, seed, rate, faults).serve(listener))
    return 0
