"""Floor 4. Results of pure tools, in one SQLite file that all actors of a run, or of several runs, share.

    key      BLAKE2b of (environment, tool, version, arguments, state), as deterministic MessagePack
    value    MessagePack
    check    CRC-32C of key and value

`state` is all else that a result depends on: nothing for a pure tool, for a tool of a world that can be
snapshot its hash, or what names it. A result that is plain data is kept; an error that a tool raises never
is, nor what a seeded failure says, since that is no result. The file is in WAL mode: readers never wait,
a process that is killed leaves it whole. A file that is locked, full or damaged costs its use, never an
episode: the tool is called.

Of equal calls at one time one is made, whichever process makes it, and the others wait for it: in its own
process until it hands the result over, in another one for the end of its claim (`tools.claims`), looked for
after 5 ms and then each eighth of the time waited for it so far. A call that fails is made by the next one.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sqlite3
import time
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from slipstream.config import EnvironmentConfig
from slipstream.errors import ConfigurationError
from slipstream.integrity import crc32c
from slipstream.tools.claims import Claims

FILE: Final = "tool_cache.sqlite"
"""Its name in a run folder."""
FOLLOW_S: Final = 600.0
"""So long an equal call waits for the first one; then it calls the tool itself."""
_FIRST_LOOK_S: Final = 0.005
_LONGEST_PAUSE_S: Final = 0.1
_PAUSE: Final = 1 / 8
"""Between two looks at another process' claim, of the time waited so far."""
_LEAST_EVICTED: Final = 1 / 16
"""Share of the entries that go at once when the file is full."""
_MOST_WAITING: Final = 4096
"""Results that wait in memory while another process writes; the oldest go beyond."""
_CHECK_EVERY: Final = 256
"""Written results between two looks at the file's size."""
_MADE: Final = (
    "CREATE TABLE IF NOT EXISTS results (number INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, "
    "value BLOB NOT NULL, mark INTEGER NOT NULL)"
)
_PLAIN: Final = (str, int, float, bool, bytes, type(None))

log = logging.getLogger(__name__)


class _Flight:
    """A call that is being made in this process, and who waits for it.

    Each has a future of its own: handed over at once, where a wait for a common one takes two rounds of the
    event loop more, and each round may hold a pass of the policy.
    """

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[bytes | None]] = []

    async def landed(self) -> bytes | None:
        """Return its result, None when it has none; raises TimeoutError after FOLLOW_S."""
        future: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        async with asyncio.timeout(FOLLOW_S):
            return await future

    def land(self, value: bytes | None) -> None:
        """Hand the result over."""
        for future in self._waiting:
            if not future.done():
                future.set_result(value)
        self._waiting.clear()


class ToolCache:
    """The results of one environment's tools.

    Example: ``listed, cached = await cache.call("search", "1", {"query": "Ada"}, "world 3", compute)``.
    """

    def __init__(self, environment: str, path: Path | None = None, *, limit_bytes: int = 1 << 28) -> None:
        """Open or create the file; without one every call calls its tool.

        Raises ConfigurationError when it cannot be created there.
        """
        self.hits = self.misses = 0
        self._environment, self._path, self._limit = environment, path, limit_bytes
        self._flights: dict[bytes, _Flight] = {}
        self._waiting: OrderedDict[bytes, bytes] = OrderedDict()
        """Results that are not yet in the file."""
        self._written = 0
        self._file: sqlite3.Connection | None = None
        self._claims: Claims | None = None
        if path is not None:
            self._file = self._opened(path)
        if self._file is not None and path is not None:
            self._claims = Claims(path.with_name(f"{path.name}-calls"))

    async def call(
        self, name: str, version: str, arguments: Any, state: Any, compute: Callable[[], Awaitable[Any]]
    ) -> tuple[Any, bool]:
        """Return what the tool returns, and whether it was not called for it.

        Of equal calls at one time only the first calls the tool; when it fails the next one does. Raises
        what `compute` raises.
        """
        key = None if self._path is None else _key(self._environment, name, version, arguments, state)
        if key is None:
            return await compute(), False
        while (value := self._read(key)) is None and (flight := self._flights.get(key)) is not None:
            try:
                value = await flight.landed()
            except TimeoutError:
                return await compute(), False
            if value is not None:
                break
        if value is not None:
            self.hits += 1
            return msgspec.msgpack.decode(value), True
        return await self._led(key, compute)

    def close(self) -> None:
        """Write what still waits, if the file lets it, and close it."""
        if self._file is not None:
            self._write()
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._claims is not None:
            self._claims.close()

    async def _led(self, key: bytes, compute: Callable[[], Awaitable[Any]]) -> tuple[Any, bool]:
        """Make a call for all of this process that wait for it, unless another process is making it."""
        flight = self._flights[key] = _Flight()
        claimed, value = False, None
        try:
            claimed, value = await self._claimed(key)
            if value is not None:
                self.hits += 1
                return msgspec.msgpack.decode(value), True
            self.misses += 1
            result = await compute()
            if _is_plain(result):
                value = msgspec.msgpack.encode(result)
                self._keep(key, value)
            return result, False
        finally:
            if claimed and self._claims is not None:
                self._claims.drop(key)
            del self._flights[key]
            flight.land(value)

    async def _claimed(self, key: bytes) -> tuple[bool, bytes | None]:
        """Return whether the claim on a call is this process' own, and the result if it is there by now."""
        began = time.monotonic()
        while not (claimed := self._claims is None or self._claims.take(key)):
            if (waited := time.monotonic() - began) > FOLLOW_S:
                return False, None
            await asyncio.sleep(min(max(_FIRST_LOOK_S, waited * _PAUSE), _LONGEST_PAUSE_S))
        # Another process has written it, if it had a result, before it let the claim go.
        return claimed, self._read(key)

    def _read(self, key: bytes) -> bytes | None:
        if key in self._waiting:
            return self._waiting[key]
        if self._file is None:
            return None
        try:
            found = self._file.execute("SELECT value, mark FROM results WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            self._failed(error)
            return None
        if found is None or not isinstance(found[0], bytes) or _mark(key, found[0]) != found[1]:
            return None
        return found[0]

    def _keep(self, key: bytes, value: bytes) -> None:
        if self._file is None:
            return
        if len(value) <= self._limit // 64:
            self._waiting[key] = value
            if len(self._waiting) > _MOST_WAITING:
                self._waiting.popitem(last=False)
        self._write()

    def _write(self) -> None:
        """Move what waits into the file, unless another process writes just now."""
        assert self._file is not None
        rows = [(key, value, _mark(key, value)) for key, value in self._waiting.items()]
        if not rows:
            return
        try:
            self._file.execute("BEGIN IMMEDIATE")
            with self._file:  # commits, or rolls back
                self._file.executemany("REPLACE INTO results (key, value, mark) VALUES (?, ?, ?)", rows)
                self._written += len(rows)
                if self._written >= _CHECK_EVERY:
                    self._written = 0
                    self._evict()
        except sqlite3.Error as error:
            self._failed(error)
            return
        self._waiting.clear()

    def _evict(self) -> None:
        """Remove the oldest results while the file is too large."""
        assert self._file is not None

        def asked(what: str) -> int:
            assert self._file is not None
            return int(self._file.execute(what).fetchone()[0] or 0)

        def full() -> bool:
            pages = asked("PRAGMA page_count") - asked("PRAGMA freelist_count")
            return pages * asked("PRAGMA page_size") > self._limit

        while full() and (count := asked("SELECT count(*) FROM results")):
            oldest = "SELECT number FROM results ORDER BY number LIMIT ?"
            some = max(1, int(count * _LEAST_EVICTED))
            self._file.execute(f"DELETE FROM results WHERE number IN ({oldest})", (some,))

    def _opened(self, path: Path) -> sqlite3.Connection | None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # No waiting for locks: what cannot be read is computed, what cannot be written waits.
            file = sqlite3.connect(path, timeout=0.0, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise ConfigurationError(
                f'environment.tool_cache: {path} cannot be used: {error}; give another path, "run" or "off"'
            ) from None
        weakref.finalize(self, file.close)
        try:
            file.execute("PRAGMA busy_timeout = 5000")
            file.execute("PRAGMA journal_mode = WAL")
            file.execute("PRAGMA synchronous = NORMAL")
            file.execute(_MADE)
            file.execute("PRAGMA busy_timeout = 0")
        except sqlite3.Error as error:
            self._file = file
            self._failed(error, final=True)
            return None
        return file

    def _failed(self, error: sqlite3.Error, *, final: bool = False) -> None:
        """Go on without the file when it is damaged or cannot be written; a lock passes."""
        code = getattr(error, "sqlite_errorcode", None) or 0
        if not final and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return
        log.warning(
            "tool cache %s is not used any more: %s; tools are called. If it is damaged, remove it and its "
            "-wal and -shm",
            self._path,
            error,
        )
        if self._file is not None:
            self._file.close()
        self._file = None
        self._waiting.clear()
        if self._claims is not None:
            self._claims.close()
            self._claims = None


def cache_of(config: EnvironmentConfig) -> ToolCache:
    """Return the cache that `environment.tool_cache` asks for; "run" without a run folder is none.

    Raises ConfigurationError.
    """
    path = None if config.tool_cache in {"off", "run"} else Path(config.tool_cache).absolute()
    return ToolCache(config.name, path, limit_bytes=config.tool_cache_bytes)


def in_folder(config: EnvironmentConfig, folder: Path) -> EnvironmentConfig:
    """Return the configuration with the cache of its run in the run's folder."""
    if config.tool_cache != "run":
        return config
    return config.model_copy(update={"tool_cache": str(folder.absolute() / FILE)})


def _key(*parts: Any) -> bytes | None:
    """Return what names a call, or None when its arguments or its state have no canonical form."""
    try:
        spelled = msgspec.msgpack.encode(parts, order="deterministic")
    except (TypeError, ValueError, OverflowError, RecursionError):
        return None
    return hashlib.blake2b(spelled, digest_size=20).digest()


def _mark(key: bytes, value: bytes) -> int:
    return crc32c([key, value])


def _is_plain(value: Any) -> bool:
    """Tell whether a value comes out of MessagePack as it went in."""
    if type(value) is int:
        return -(1 << 63) <= value < 1 << 63
    if type(value) is str:
        return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
    if type(value) is list:
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(type(name) is str and _is_plain(name) and _is_plain(item) for name, item in value.items())
    return type(value) in _PLAIN
