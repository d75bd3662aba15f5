"""Floor 4. The bridge's other end: runs in the interpreter that a foreign package is installed in.

    python -I worker.py

Needs nothing but the standard library, the one file of its kind (of_openenv.py, ...) and that package, so
that it runs in any interpreter from Python 3.9 on. Requests and answers stand as in `tools.frames`, with
JSON in the place of MessagePack:

    u32 length, big-endian | {"id": 7, "method": "step", "episode": 3, ...}
    u32 length, big-endian | {"id": 7, "value": {...}}  or  {"id": 7, "error": {"kind": ..., "text": ...}}

    open    kind, entry, arguments, path, most    what there is; asked once, before anything else
    reset   episode, task, seed                   {"system", "user"}
    step    episode, text, name, arguments        {"text", "role", "reward", "done"}, perhaps "failed"
    score   episode                               {"reward", "metrics"}
    close   episode
    ping

Each request has a thread of its own, so that no episode waits for another's; coroutines share one loop.
Whatever the package prints goes to standard error. When the requests end, so do we and all we started.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import signal
import struct
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

LENGTH = struct.Struct(">I")
THREADS = 256
REASON = 300
"""Most characters of what an exception says."""


class Refusal(Exception):
    """What `open` cannot do, of a kind that the other end has a sentence for."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Adapter:
    """One kind of environment: imports its package, makes its episodes."""

    package = ""
    distribution = ""
    converses = False
    concurrent = True

    def __init__(self, entry: str, arguments: dict[str, Any]) -> None:
        self.module = imported(self.package)
        self.entry, self.arguments = entry, arguments

    def tools(self) -> list[dict[str, Any]]:
        """Return the tools that the policy is given."""
        return []

    def questions(self) -> list[str] | None:
        """Return the questions of its own tasks, or None when tasks come from elsewhere."""
        return None

    def episode(self, task: dict[str, Any], seed: int) -> Any:
        """Return a new episode: an object with reset, step, score and close."""
        raise NotImplementedError


class Worker:
    """Answers requests until they end."""

    def __init__(self) -> None:
        # What the package prints must not stand between answers.
        self._requests, self._answers = os.dup(0), os.dup(1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        self._writing = threading.Lock()
        self._pool = ThreadPoolExecutor(THREADS)
        self._episodes: dict[int, Any] = {}
        self._most = 1 << 20

    def serve(self) -> None:
        """Answer; returns when there is nobody to answer."""
        while True:
            header = self._read(LENGTH.size)
            body = self._read(LENGTH.unpack(header)[0]) if header else b""
            if not body:
                return
            request = json.loads(body)
            number, method = request.pop("id"), request.pop("method")
            if method == "ping":
                self._write({"id": number, "value": None})
            elif method == "open":
                self._write({"id": number, **self._opened(request)})
            else:
                done = self._pool.submit(getattr(self, f"_{method}"), **request)
                done.add_done_callback(partial(self._answer, number))

    def _opened(self, request: dict[str, Any]) -> dict[str, Any]:
        """Import the package, on the main thread as packages expect; whatever else it raises ends us."""
        self._most = request["most"]
        sys.path[:0] = request["path"]
        sys.path.append(os.getcwd())
        try:
            self._adapter = adapter_of(request["kind"])(request["entry"], request["arguments"])
            value = {
                "tools": self._adapter.tools(),
                "questions": self._adapter.questions(),
                "converses": self._adapter.converses,
                "concurrent": self._adapter.concurrent,
                "versions": {
                    self._adapter.distribution: version(self._adapter),
                    f"python of {self._adapter.distribution}": platform.python_version(),
                },
            }
        except Refusal as refusal:
            return {"error": {"kind": refusal.kind, "text": str(refusal)}}
        return {"value": value}

    def _reset(self, episode: int, task: dict[str, Any], seed: int) -> dict[str, Any]:
        self._episodes[episode] = self._adapter.episode(task, seed)
        return dict(self._episodes[episode].reset())

    def _step(self, episode: int, **message: Any) -> dict[str, Any]:
        return dict(self._episodes[episode].step(**message))

    def _score(self, episode: int) -> dict[str, Any]:
        return dict(self._episodes[episode].score())

    def _close(self, episode: int) -> None:
        held = self._episodes.pop(episode, None)
        if held is not None:
            held.close()

    def _answer(self, number: int, done: Future[Any]) -> None:
        error = done.exception()
        if error is not None:
            self._write({"id": number, "error": {"kind": "raised", "text": reason(error)}})
        else:
            self._write({"id": number, "value": done.result()})

    def _write(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer, default=str).encode()
        if len(body) > self._most:
            error = {"kind": "oversized", "text": f"{len(body)} bytes, at most {self._most}"}
            body = json.dumps({"id": answer["id"], "error": error}).encode()
        frame = memoryview(LENGTH.pack(len(body)) + body)
        with self._writing:
            while frame:
                frame = frame[os.write(self._answers, frame) :]

    def _read(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = os.read(self._requests, size - len(parts))
            if not part:
                return b""
            parts += part
        return bytes(parts)


def adapter_of(kind: str) -> Any:
    """Return the adapter class of a kind, from the file beside this one."""
    # There is no slipstream in this interpreter: that file finds this one under the name it has in ours.
    sys.modules["slipstream.environments.adapters.worker"] = sys.modules["__main__"]
    place = Path(__file__).with_name(f"of_{kind.replace('-', '_')}.py")
    spec = importlib.util.spec_from_file_location(place.stem, place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ADAPTER


def imported(package: str) -> Any:
    """Return a package; refuses when it is not there."""
    if importlib.util.find_spec(package) is None:
        raise Refusal("package", package)
    return importlib.import_module(package)


def attribute(entry: str) -> Any:
    """Return what module:attribute or path.py:attribute names; refuses when there is none."""
    where, _, name = entry.rpartition(":")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise Refusal("entry", f"there is no file {where}")
        # Under its own name, where it finds itself when it asks for its types.
        sys.path.insert(0, str(Path(where).resolve().parent))
        where = Path(where).stem
    found = importlib.util.find_spec(where.partition(".")[0]) if where else None
    if found is None:
        raise Refusal("entry", f"there is no module {where or entry}")
    module = importlib.import_module(where)
    if not hasattr(module, name):
        raise Refusal("entry", f"{where} has no {name}")
    return getattr(module, name)


def version(adapter: Adapter) -> str:
    """Return the version of a distribution, or what the package says of itself."""
    try:
        return importlib.metadata.version(adapter.distribution)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(adapter.module, "__version__", "unknown"))


def numbers(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the metrics that are numbers."""
    return {str(k): float(v) for k, v in (metrics or {}).items() if isinstance(v, (bool, int, float))}


def reason(error: BaseException) -> str:
    """Return an exception as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:REASON]


def awaited(value: Any) -> Any:
    """Return a value, or what a coroutine returns on the loop that all share."""
    if not inspect.isawaitable(value):
        return value

    async def result() -> Any:
        return await value

    # Whoever asked for it has a deadline, and kills this process.
    return asyncio.run_coroutine_threadsafe(result(), LOOP).result()


def end() -> None:
    """End this process with all it started."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


LOOP = asyncio.new_event_loop()

if __name__ == "__main__":
    threading.Thread(target=LOOP.run_forever, daemon=True).start()
    Worker().serve()
    end()
