"""Floor 4. The fork server of a sandbox: imports once, then forks each worker in milliseconds.

    python -m slipstream.tools.forkserver FD

    fork server   reads a Setup, imports the service, says Ready; each message brings two sockets
      └ keeper    holds the leash: when its other end is closed, or the worker ends, kills all that the
        │         worker left behind, waits until it is gone, and lets go of the leash
        └ worker  confined; answers calls over its channel, runs the tools

No tool code runs in fork server or keeper. When the actor dies its sockets close, and everything ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from slipstream.errors import InfrastructureError, ToolError
from slipstream.tools.confinement import Confinement, become_keeper, confine, namespaces_work
from slipstream.tools.frames import (
    LENGTH,
    MAX_REQUEST_BYTES,
    Answer,
    Ready,
    Request,
    Setup,
    frame_of,
    read_frame,
)

MAX_SETUP_BYTES: Final = 128 << 10
SWEEP_EVERY_S: Final = 0.001
MakeService = Callable[[], object]


def main() -> int:
    """Serve until the actor closes its end, or dies; returns 0."""
    with socket.socket(fileno=int(sys.argv[1])) as control:
        setup = msgspec.msgpack.decode(control.recv(MAX_SETUP_BYTES), type=Setup)
        try:
            _serve(control, setup)
        finally:
            # Whoever held the leashes is gone too. Children ignored are waited for until none is left.
            with contextlib.suppress(ChildProcessError):
                os.wait()
            if setup.remove_scratch:
                shutil.rmtree(setup.limits.scratch, ignore_errors=True)
    return 0


def _serve(control: socket.socket, setup: Setup) -> None:
    module, _, function = setup.service.partition(":")
    make: MakeService = getattr(importlib.import_module(module), function)(setup.options)
    namespaces = setup.limits.namespaces and namespaces_work()
    control.send(frame_of(Ready(confinement=Confinement(namespaces=namespaces, filtered=False))))
    # Keepers are nobody's to wait for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Pages that no collector touches stay shared with every worker.
    gc.collect()
    gc.freeze()
    number = 0
    while True:
        message, files, _, _ = socket.recv_fds(control, 64, 2)
        if not message:
            return
        number += 1
        channel, leash = (socket.socket(fileno=file) for file in files)
        Keeper(
            channel=channel, leash=leash, setup=setup, make=make, number=number, namespaces=namespaces
        ).fork()


def nothing(options: dict[str, Any]) -> MakeService:
    """Return a service without methods: enough to try a sandbox out."""
    return object


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeper:
    """One worker's keeper, and the worker."""

    channel: socket.socket
    leash: socket.socket
    setup: Setup
    make: MakeService
    number: int
    namespaces: bool

    def fork(self) -> None:
        """Start the keeper; the caller is left without the sockets."""
        with self.channel, self.leash:
            try:
                if os.fork():
                    return
            except OSError as error:
                self.channel.send(frame_of(Ready(error=f"fork: {error.strerror}")))
                return
            try:
                self._keep()
            finally:
                os._exit(0)

    def _keep(self) -> None:
        """Fork the worker, and see to it that nothing of it is left in the end."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            become_keeper(self.number, namespaces=self.namespaces)
            worker = os.fork()
        except OSError as error:
            self.channel.send(frame_of(Ready(error=str(error))))
            return
        if worker == 0:
            self.leash.close()
            self._work()
            os._exit(0)
        self.channel.close()
        select.select([self.leash.fileno(), os.pidfd_open(worker)], [], [])
        os.kill(worker, signal.SIGKILL)
        if not self.namespaces:
            end_descendants()
            shutil.rmtree(Path(self.setup.limits.scratch) / str(self.number), ignore_errors=True)
            return
        # The first process of a pid namespace is only gone when all others of it are.
        os.waitpid(worker, 0)

    def _work(self) -> None:
        """Answer calls until the channel ends."""
        channel, most = self.channel, self.setup.answer_bytes
        try:
            confinement = confine(
                self.setup.limits, self.number, channel.fileno(), namespaces=self.namespaces
            )
        except OSError as error:
            channel.send(frame_of(Ready(error=str(error))))
            return
        service = self.make()
        channel.sendall(frame_of(Ready(confinement=confinement)))
        with asyncio.Runner() as runner:
            while (frame := read_frame(channel, MAX_REQUEST_BYTES)) is not None:
                request = msgspec.msgpack.decode(frame, type=Request)
                answer = frame_of(runner.run(_answer(service, request)))
                if len(answer) - LENGTH.size > most:
                    text = f"{len(answer)} bytes, at most {most}"
                    answer = frame_of(Answer(number=request.number, kind="oversized", text=text))
                channel.sendall(answer)


async def _answer(service: object, request: Request) -> Answer:
    """Call the service; whatever it raises is an answer too."""
    call = asyncio.ensure_future(getattr(service, request.method)(**request.arguments))
    await asyncio.wait({call})
    match call.exception():
        case None:
            value = msgspec.Raw(msgspec.msgpack.encode(call.result()))
            return Answer(number=request.number, kind="value", value=value)
        case ToolError() as error:
            return Answer(number=request.number, kind="refused", text=str(error))
        case InfrastructureError() as error:
            return Answer(number=request.number, kind="infrastructure", text=str(error))
        case error:
            return Answer(number=request.number, kind="crashed", text=type(error).__name__)


def end_descendants() -> None:
    """Kill whatever descends from this subreaper until nothing is left, however fast it forks."""
    while True:
        stopped: set[int] = set()
        # Standing still they cannot fork: the next look finds those forked during the last.
        while fresh := _descendants(os.getpid()) - stopped:
            for pid in fresh:
                _signal(pid, signal.SIGSTOP)
            stopped |= fresh
        for pid in stopped:
            _signal(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(SWEEP_EVERY_S)


def _descendants(root: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # Behind the name, which may hold spaces and brackets; field 4 of proc(5).
                parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, queue = set[int](), [root]
    while queue:
        below = children.get(queue.pop(), [])
        found.update(below)
        queue += below
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":
    sys.exit(main())
