"""Floor 4. A program of somebody else's that serves an actor: its messages, its deadlines, its end.

Such programs live on an event loop of their own, in a thread: they outlast the loop of one evaluation, and
their pipes are read while an actor computes. A program and all it started make one process group, which is
killed as a whole. How it ended is one sentence, and an InfrastructureError for every call that it held.

wait                       ends after
answer to a call           the seconds of the call, with CallTimeout
a killed program's end     END_S
its last words             LAST_WORDS_S after its end
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import threading
import weakref
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Protocol, TypeVar

from slipstream import plain_json
from slipstream.errors import FrameError, InfrastructureError
from slipstream.tools.frames import LENGTH, length_of

T = TypeVar("T")
Message = dict[str, Any]
END_S: Final = 10.0
LAST_WORDS_S: Final = 1.0
PONG_S: Final = 5.0
"""For a program that left a call unanswered to show that it still answers others."""
_TAIL_BYTES: Final = 4096
_LONGEST_REASON: Final = 300
_INHERITED: Final = ("HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "USER")
"""Variables that a foreign program is given; keys and our own PYTHONPATH are none of its business."""

log = logging.getLogger(__name__)


class CallTimeout(Exception):
    """A call had no answer in its time."""


class Oversized(Exception):
    """The answer to a call was larger than is read."""


class Framing(Protocol):
    """How messages stand in a stream."""

    def write(self, message: Message) -> bytes:
        """Return a message as bytes."""

    async def read(self, stream: asyncio.StreamReader, most: int) -> bytes | None:
        """Return the next message of at most `most` bytes, or None at the end; raises FrameError.

        Raises Oversized, with the head of a message that was too large, when what follows can be read.
        """


class Lines:
    """One message a line, as MCP has it over standard input and output."""

    def write(self, message: Message) -> bytes:
        """Return a line."""
        return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"

    async def read(self, stream: asyncio.StreamReader, most: int) -> bytes | None:
        """Return the next line; one that is too long is skipped to its end."""
        head = b""
        while True:
            try:
                line = await stream.readuntil(b"\n")
            except asyncio.IncompleteReadError:
                return None
            except asyncio.LimitOverrunError as error:
                skipped = await stream.read(max(error.consumed, 1))
                head = head or skipped[:_TAIL_BYTES]
                continue
            if head or len(line) > most:
                raise Oversized((head or line[:_TAIL_BYTES]).decode(errors="replace"))
            return line


class Frames:
    """Length and JSON (`tools.frames`), as our own worker has it."""

    def write(self, message: Message) -> bytes:
        """Return a frame."""
        body = json.dumps(message, separators=(",", ":")).encode()
        return LENGTH.pack(len(body)) + body

    async def read(self, stream: asyncio.StreamReader, most: int) -> bytes | None:
        """Return the next frame's body."""
        try:
            return await stream.readexactly(length_of(await stream.readexactly(LENGTH.size), most))
        except asyncio.IncompleteReadError:
            return None


class Foreign:
    """One life of a program; it is made by `start` and lives on the loop of `ours`."""

    def __init__(self, name: str, process: Process, framing: Framing, most_bytes: int) -> None:
        """Take a started process; `start` makes it."""
        self.name = name
        self.ended = ""
        """How it ended; empty while it lives."""
        self.unreadable = 0
        """Messages that were none."""
        self.told: Callable[[Message], None] = lambda _: None
        """Is given each message that answers no call."""
        self._process, self._framing, self._most = process, framing, most_bytes
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._number = 0
        self._tail = b""
        self._reading = asyncio.ensure_future(self._read())
        self._listening = asyncio.ensure_future(self._listen())
        self._watching = asyncio.ensure_future(self._watch())
        self.kill = weakref.finalize(self, _kill_group, process.pid)

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        *,
        name: str,
        framing: Framing,
        most_bytes: int,
        variables: Mapping[str, str],
    ) -> Foreign:
        """Start a program; raises InfrastructureError when the system cannot."""
        inherited = {key: os.environ[key] for key in _INHERITED if key in os.environ}
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                env={**inherited, **variables},
                limit=most_bytes,
                start_new_session=True,
            )
        except OSError as error:
            raise InfrastructureError(f"{name}: cannot run {command[0]}: {error.strerror}") from error
        return cls(name, process, framing, most_bytes)

    @property
    def pid(self) -> int:
        """Of its process, and of its process group."""
        return self._process.pid

    async def call(self, message: Message, seconds: float) -> Message:
        """Send a message under a number of its own and return the answer of that number.

        Raises CallTimeout, Oversized, and InfrastructureError when the program ends.
        """
        self._number += 1
        number = self._number
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            async with asyncio.timeout(seconds):
                await self.send({**message, "id": number})
                return await answer
        except TimeoutError:
            raise CallTimeout(str(number)) from None
        finally:
            self._waiting.pop(number, None)

    async def send(self, message: Message) -> None:
        """Send a message that asks for no answer; raises InfrastructureError."""
        if self.ended:
            raise InfrastructureError(self.ended)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(self._framing.write(message))
            async with asyncio.timeout(PONG_S):
                await self._process.stdin.drain()
        except TimeoutError:
            self._end("reads nothing")
        except OSError:
            async with asyncio.timeout(END_S):
                await asyncio.shield(self._watching)
        if self.ended:
            raise InfrastructureError(self.ended)

    def end(self, reason: str) -> None:
        """Kill it for a reason that its calls are told."""
        self._end(reason)

    async def close(self) -> None:
        """Kill it with all it started, and wait for its end."""
        self.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await asyncio.shield(self._watching)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while True:
            try:
                body = await self._framing.read(self._process.stdout, self._most)
            except Oversized as error:
                self._refuse(str(error))
                continue
            except FrameError as error:
                self._end(f"broke the protocol: {error}")
                return
            if body is None:
                return
            try:
                message = plain_json.parse(body)
            except ValueError:
                message = None
            if isinstance(message, dict):
                self._take(message)
            elif body.strip():
                self._count(body)

    def _take(self, message: Message) -> None:
        number = message.get("id")
        answers = "method" not in message and isinstance(number, int)
        if not answers:
            self.told(message)
        elif (waiting := self._waiting.get(number)) is not None and not waiting.done():  # type: ignore[arg-type]
            waiting.set_result(message)

    def _refuse(self, head: str) -> None:
        """Tell the call whose answer was too large, where its head says which it is."""
        found = re.search(r'"id"\s*:\s*(\d{1,18})\b', head)
        waiting = self._waiting.get(int(found[1])) if found else None
        if waiting is not None and not waiting.done():
            waiting.set_exception(Oversized(f"more than {self._most} bytes"))

    def _count(self, body: bytes) -> None:
        self.unreadable += 1
        if self.unreadable == 1:
            said = " ".join(body[:80].decode(errors="replace").split())
            log.warning("%s: expected JSON on its standard output, got %r; left out", self.name, said)

    async def _listen(self) -> None:
        assert self._process.stderr is not None
        while said := await self._process.stderr.read(_TAIL_BYTES):
            self._tail = (self._tail + said)[-_TAIL_BYTES:]

    async def _watch(self) -> None:
        """Wait for the end of the process, or of its output."""
        exited = asyncio.ensure_future(self._process.wait())
        # Until the program's own end, which whoever uses it brings about.
        await asyncio.wait({exited, self._reading}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({exited, self._reading}, timeout=LAST_WORDS_S)
        # One without output but alive is of no more use, nor is what it started.
        self.kill()
        await asyncio.wait({exited, self._listening}, timeout=END_S)
        status = self._process.returncode
        how = f"was ended by signal {-status}" if status and status < 0 else f"ended with status {status}"
        lines = self._tail.decode(errors="replace").strip().splitlines()
        self._end(f"{how}: {lines[-1]}" if lines else how)

    def _end(self, how: str) -> None:
        if not self.ended:
            self.ended = " ".join(f"{self.name} {how}".split())[:_LONGEST_REASON]
        self.kill()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(InfrastructureError(self.ended))


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


@lru_cache(maxsize=1)
def _loop(owner: int) -> asyncio.AbstractEventLoop:
    """Return the loop that foreign programs live on in the process `owner`."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="foreign", daemon=True).start()
    return loop


async def there(work: Coroutine[Any, Any, T]) -> T:
    """Do something on the loop of the foreign programs; what is cancelled here is cancelled there."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, _loop(os.getpid())))


def done_there(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """Do something there and wait for it here, without a loop; raises TimeoutError."""
    return asyncio.run_coroutine_threadsafe(work, _loop(os.getpid())).result(seconds)
