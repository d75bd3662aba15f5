"""Floor 4. The actor's end of a sandbox: workers that are killed with all they started.

    sandbox = Sandbox(Backend..., service="module:function", options={...}, config=config.environment)
    worker = await sandbox.worker()
    value = await worker.call("step", 5.0, message=message)
    await worker.close()

wait                    ends after
worker to be ready      START_S, with InfrastructureError
answer to a call        the seconds of the call, with WorkerTimeout; the worker is dead then
end of a worker         END_S, with InfrastructureError
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import socket
import subprocess
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import msgspec

from slipstream.config import SandboxConfig
from slipstream.errors import ConfigurationError, FrameError, InfrastructureError, ToolError
from slipstream.flight_recorder import FLIGHT
from slipstream.messages import decode_struct
from slipstream.tools import wording
from slipstream.tools.bubblewrap import SCRATCH, Backend, command, scratch_folder
from slipstream.tools.confinement import Confinement, Limits
from slipstream.tools.frames import (
    LENGTH,
    MAX_REQUEST_BYTES,
    Answer,
    Ready,
    Request,
    Setup,
    frame_of,
    length_of,
)

START_S: Final = 60.0
"""Of the fork server, which imports the environment, and of a worker on a busy machine."""
END_S: Final = 30.0
_GRACE_S: Final = 5.0
"""For the fork server to see the last workers off."""
_MAX_READY_BYTES: Final = 16 << 10
_ENVELOPE_BYTES: Final = 1 << 10
_OWN_PACKAGES: Final = ("slipstream", "slipstream_kernels")

log = logging.getLogger(__name__)


class WorkerError(Exception):
    """A tool ended its worker, or broke the protocol; the message is what the policy may read."""


class WorkerTimeout(WorkerError):
    """A call did not return in its time."""


class Sandbox:
    """A fork server and the workers it forks; each worker is one clean process tree.

    Example: ``Sandbox("process", service="slipstream.tools.forkserver:main", options={}, config=config)``.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        service: str,
        options: dict[str, Any],
        config: SandboxConfig,
        packages: Sequence[str] = (),
        namespaces: bool = True,
    ) -> None:
        """Start the fork server; raises ConfigurationError or InfrastructureError when it does not come up.

        `packages` are top-level packages that `service` needs beside its own and ours.
        """
        self.backend, self._config, self._namespaces = backend, config, namespaces
        self._service, self._options = service, options
        module = service.partition(":")[0].partition(".")[0]
        self._packages = tuple(dict.fromkeys((*_OWN_PACKAGES, module, *packages)))
        self._start()

    @property
    def pid(self) -> int:
        """The process that everything in this sandbox descends from."""
        return self._server.pid

    def scratch_files(self) -> list[str]:
        """Return what workers have left on the host's disk."""
        return [] if self.backend == "bubblewrap" else os.listdir(self._scratch)

    def close(self) -> None:
        """End the fork server and every worker."""
        self._close()

    async def worker(self) -> Worker:
        """Return a fresh worker; raises InfrastructureError when the host cannot start one."""
        server = self._server
        try:
            return await self._forked()
        except InfrastructureError:
            if server is self._server:
                if server.poll() is None:
                    raise
                log.warning("sandbox: the fork server has ended (%s); starting another", server.returncode)
                self.close()
                self._start()
            return await self._forked()

    async def _forked(self) -> Worker:
        channel, channel_there = socket.socketpair()
        leash, leash_there = socket.socketpair()
        worker = Worker(channel, leash, self._config.answer_bytes)
        try:
            with channel_there, leash_there:
                try:
                    socket.send_fds(
                        self._control, [b"worker"], [channel_there.fileno(), leash_there.fileno()]
                    )
                except OSError as error:
                    raise InfrastructureError(f"sandbox: no fork server ({error.strerror})") from error
            await worker.ready()
        except BaseException:
            await worker.close()
            raise
        return worker

    def _start(self) -> None:
        """Start the fork server and wait until it has imported the service."""
        self._scratch = scratch_folder(self.backend)
        control, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        said = os.memfd_create("stderr")
        try:
            with there:
                line, environment = command(self.backend, there.fileno(), self._packages)
                server = subprocess.Popen(
                    line,
                    env=environment,
                    pass_fds=(there.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    start_new_session=True,
                )
        except BaseException:
            control.close()
            os.close(said)
            raise
        self._close = weakref.finalize(self, _end, control, server, self._scratch)
        try:
            self.confinement = self._greeted(control)
        except InfrastructureError as error:
            self.close()
            last = os.pread(said, 4096, max(0, os.fstat(said).st_size - 4096)).decode(errors="replace")
            reason = (last.strip().splitlines() or [str(error)])[-1]
            raise InfrastructureError(
                f"sandbox {self.backend}: its fork server does not start: {reason}"
            ) from error
        finally:
            os.close(said)
        self._control, self._server = control, server

    def _greeted(self, control: socket.socket) -> Confinement:
        config = self._config
        limits = Limits(
            memory_bytes=config.memory_bytes,
            scratch_bytes=config.scratch_bytes,
            processes=config.processes,
            open_files=config.open_files,
            cpu_s=config.cpu_s,
            scratch=self._scratch,
            namespaces=self._namespaces,
        )
        setup = Setup(
            service=self._service,
            options=self._options,
            limits=limits,
            answer_bytes=config.answer_bytes,
            remove_scratch=self.backend == "process",
        )
        control.settimeout(START_S)
        try:
            control.send(msgspec.msgpack.encode(setup))
            answer = control.recv(_MAX_READY_BYTES)
        except OSError as error:
            raise InfrastructureError(str(error)) from error
        if not answer:
            raise InfrastructureError("it ended")
        confinement = msgspec.msgpack.decode(answer[LENGTH.size :], type=Ready).confinement
        assert confinement is not None
        return confinement


class Worker:
    """One worker. Its calls are made one after the other."""

    def __init__(self, channel: socket.socket, leash: socket.socket, answer_bytes: int) -> None:
        """Take both sockets; nothing is waited for."""
        channel.setblocking(False)
        leash.setblocking(False)
        self._channel, self._leash, self._answer_bytes = channel, leash, answer_bytes
        self._number = 0
        self.confinement: Confinement | None = None

    async def ready(self) -> None:
        """Wait until it is confined; raises InfrastructureError."""
        try:
            async with asyncio.timeout(START_S):
                ready = msgspec.msgpack.decode(await self._frame(_MAX_READY_BYTES), type=Ready)
        except TimeoutError:
            raise InfrastructureError(f"sandbox: a worker was not ready within {START_S:g} s") from None
        except (OSError, WorkerError, FrameError, msgspec.MsgspecError) as error:
            raise InfrastructureError(f"sandbox: a worker did not start: {error}") from error
        if ready.error:
            raise InfrastructureError(f"sandbox: a worker cannot be confined: {ready.error}")
        self.confinement = ready.confinement

    async def call(self, method: str, seconds: float, **arguments: Any) -> msgspec.Raw:
        """Call a method of the service and return its result, still MessagePack.

        Raises ToolError as the service did, InfrastructureError as it did, and WorkerError when it
        crashed, took longer than `seconds`, said too much or broke the protocol: close the worker then.
        """
        # Unpredictable, so that no answer can be left ready for the next call.
        self._number = secrets.randbits(63)
        request = frame_of(Request(number=self._number, method=method, arguments=arguments))
        if len(request) - LENGTH.size > MAX_REQUEST_BYTES:
            raise WorkerError(wording.TOO_LARGE.format(len(request)))
        try:
            async with asyncio.timeout(seconds):
                answer = await self._answer(request)
        except TimeoutError:
            raise WorkerTimeout(wording.TOO_SLOW.format(seconds)) from None
        except OSError:
            raise WorkerError(wording.CRASHED) from None
        except FrameError:
            raise WorkerError(wording.BROKE_PROTOCOL) from None
        match answer.kind:
            case "value":
                return answer.value
            case "refused":
                raise ToolError(answer.text)
            case "infrastructure":
                raise InfrastructureError(answer.text)
            case "oversized":
                raise WorkerError(wording.TOO_MUCH)
            case _:
                raise WorkerError(f"tool failed with {answer.text}"[:_ENVELOPE_BYTES])

    async def close(self) -> None:
        """Kill it and all it started; returns when nothing of it is left. Raises InfrastructureError."""
        if self._leash.fileno() < 0:
            return
        loop = asyncio.get_running_loop()
        try:
            self._channel.close()
            self._leash.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(END_S):
                while await loop.sock_recv(self._leash, 64):
                    pass
        except TimeoutError:
            raise InfrastructureError(f"sandbox: a killed worker was not gone within {END_S:g} s") from None
        except OSError:
            return
        finally:
            self._leash.close()

    def abandon(self) -> None:
        """Kill it without waiting for the end."""
        self._channel.close()
        self._leash.close()

    async def _answer(self, request: bytes) -> Answer:
        self._expect_silence()
        await asyncio.get_running_loop().sock_sendall(self._channel, request)
        body = await self._frame(self._answer_bytes)
        answer = decode_struct(
            body, _ANSWER, what="answer of a worker", limit=self._answer_bytes, free_form=True
        )
        if answer.number != self._number:
            raise FrameError(f"answer of a worker: expected number {self._number}, got {answer.number}")
        return answer

    def _expect_silence(self) -> None:
        """Refuse what was said without being asked, such as a second answer."""
        try:
            said = self._channel.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        raise FrameError("worker: expected silence") if said else ConnectionResetError("worker ended")

    async def _frame(self, most: int) -> bytes:
        header = await self._exactly(LENGTH.size)
        try:
            length = length_of(header, most)
        except FrameError:
            raise WorkerError(wording.TOO_MUCH) from None
        return await self._exactly(length)

    async def _exactly(self, size: int) -> bytes:
        loop, parts = asyncio.get_running_loop(), bytearray()
        while len(parts) < size:
            part = await loop.sock_recv(self._channel, size - len(parts))
            if not part:
                raise WorkerError(wording.CRASHED)
            parts += part
        return bytes(parts)


_ANSWER: Final = msgspec.msgpack.Decoder(Answer)


def choose(wanted: str) -> Backend:
    """Return the backend for environment.sandbox = "process", "bubblewrap" or "auto" on this machine.

    Raises ConfigurationError when bubblewrap is asked for and does not work here.
    """
    if wanted == "process":
        return "process"
    reason = why_not_bubblewrap()
    if not reason:
        return "bubblewrap"
    if wanted == "bubblewrap":
        raise ConfigurationError(
            f'environment.sandbox = "bubblewrap" does not work on this machine: {reason}; choose "process"'
        )
    chosen = f"sandbox: process, without bubblewrap ({reason}): tools see the host's files as their user"
    log.warning("%s", chosen)
    FLIGHT.note(chosen)
    return "process"


@lru_cache(maxsize=1)
def why_not_bubblewrap() -> str:
    """Return why bubblewrap cannot confine workers here, or ""; tried once, with a real fork server."""
    try:
        sandbox = Sandbox(
            "bubblewrap", service="slipstream.tools.forkserver:nothing", options={}, config=SandboxConfig()
        )
    except (ConfigurationError, InfrastructureError) as error:
        return str(error)
    sandbox.close()
    return "" if sandbox.confinement.namespaces else "user namespaces cannot be nested"


def _end(control: socket.socket, server: subprocess.Popen[bytes], scratch: str) -> None:
    control.close()
    try:
        server.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    # A fork server that came to its own end has removed it already; inside bubblewrap it is not the host's.
    if scratch != SCRATCH:
        shutil.rmtree(scratch, ignore_errors=True)
