"""Floor 4. Games of TextWorldExpress in one Java process that all episodes of this process share.

    episode ── calls, in threads with a deadline ──▶ JVM: one interface object for each game being played

The JVM starts with the first game, takes about a second to do so, and ends with this process: it reads its
standard input. It listens on the loopback only, behind a token. When it dies or hangs, calls fail as
infrastructure, and the next game starts another.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import selectors
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeVar

from slipstream.errors import ConfigurationError, InfrastructureError, ToolError
from slipstream.extras import require

T = TypeVar("T")
START_S: Final = 30.0
"""Until the JVM says where it listens."""
CALL_S: Final = 20.0
"""Of one call; generating the largest game takes about a second."""
END_S: Final = 5.0
THREADS: Final = 4
DRAWS: Final = 16
"""Of ways, to find the best one."""
HEAP: Final = "-Xmx1g"

log = logging.getLogger(__name__)


class Game:
    """One game being played; made by `Games.begin`."""

    def __init__(self, games: Games, interface: Any, jvm: Jvm) -> None:
        self._games, self.interface, self.jvm = games, interface, jvm
        self.task: str = ""
        """What is to be done, in the game's words."""

    async def step(self, command: str) -> dict[str, Any]:
        """Carry a command out; returns the game's own account of it.

        Raises InfrastructureError, and ToolError when the game itself fails at the command.
        """
        from py4j.protocol import Py4JJavaError

        try:
            return await self._games.aside(self.jvm, lambda: _decoded(self.interface.stepJSON(command)))
        except Py4JJavaError as error:
            raise ToolError(f"the game fails at it: {error.java_exception.getClass().getName()}") from error


class Games:
    """All games of one kind in this process.

    Example: ``game, opening = await Games("coin", "numLocations=3").begin(7, "train")``.
    """

    def __init__(self, name: str, parameters: str) -> None:
        """Start nothing yet; raises ConfigurationError when Java or the package is missing."""
        self._jar, self._py4j_jar = _jars()
        self._name, self._parameters = name, parameters
        self._threads = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="games")
        self._lock = threading.Lock()
        self.gold = lru_cache(maxsize=4096)(self._gold)
        self._jvm: Jvm | None = None

    async def begin(self, seed: int, fold: str) -> tuple[Game, dict[str, Any]]:
        """Return a game at its beginning; raises InfrastructureError and ConfigurationError."""
        jvm = await asyncio.get_running_loop().run_in_executor(self._threads, self._started)

        def begun() -> tuple[Game, dict[str, Any]]:
            game = Game(self, self._interface(jvm), jvm)
            opening = _decoded(game.interface.generateNewGameJSON(seed, fold, False))
            game.task = str(game.interface.getTaskDescription())
            return game, opening

        return await self.aside(jvm, begun)

    def end(self, game: Game) -> None:
        """Let another episode have what this game was played with: making one costs 0.1 s."""
        game.jvm.idle.append(game.interface)

    def _gold(self, seed: int, fold: str) -> tuple[str, ...]:
        """Return commands that win a game, the same ones each time; waits for the JVM.

        In some games the way from room to room is drawn at random, and anew each time: without its loops it
        is the straight one, or where there are several the best of so many draws, which are then all but
        certain to hold it. Raises InfrastructureError.
        """
        jvm, drawn, ways = self._started(), set[tuple[str, ...]](), set[tuple[str, ...]]()
        with _failing_as_infrastructure(jvm):
            interface = self._interface(jvm)
            for number in range(DRAWS):
                if number == 2 and len(drawn) == 1:
                    break  # nothing is drawn here
                interface.generateNewGameJSON(seed, fold, True)
                steps = interface.getGoldActionSequence()
                path = tuple(str(command) for command in steps)
                jvm.gateway.detach(steps)
                if path not in drawn:
                    drawn.add(path)
                    ways.add(self._straightened(interface, seed, fold, path))
            best = min(ways, key=_worth)
            if len(drawn) > 1:
                best = self._without_doors(interface, seed, fold, best)
        jvm.idle.append(interface)
        return best

    def _straightened(self, interface: Any, seed: int, fold: str, path: tuple[str, ...]) -> tuple[str, ...]:
        """Return a path up to where it wins, without its loops as far as it then still wins."""
        rooms = self._played(interface, seed, fold, path)[0]
        for doors in (True, False):
            shorter = _without_loops(path, rooms, doors=doors)
            won = self._played(interface, seed, fold, shorter)[1]
            if won:
                return shorter[:won]
        return path

    def _without_doors(self, interface: Any, seed: int, fold: str, path: tuple[str, ...]) -> tuple[str, ...]:
        """Return a path without doors that it opens on its way and does not need: which ones is chance."""
        moved = next((n for n, command in enumerate(path) if command.startswith("move ")), len(path))
        for number in range(len(path) - 1, moved, -1):
            shorter = path[:number] + path[number + 1 :]
            if path[number].startswith("open door ") and self._played(interface, seed, fold, shorter)[1]:
                path = shorter
        return path

    def _played(self, interface: Any, seed: int, fold: str, path: Sequence[str]) -> tuple[list[str], int]:
        """Return the rooms before each command and at the end, "" where none is told, and where it is won."""
        account = _decoded(interface.generateNewGameJSON(seed, fold, False))
        rooms = [_room(account)]
        for number, command in enumerate(path, start=1):
            account = _decoded(interface.stepJSON(command))
            rooms.append(_room(account) or rooms[-1])
            if account["tasksuccess"]:
                return rooms, number
        return rooms, 0

    def close(self) -> None:
        """End the JVM."""
        jvm, self._jvm = self._jvm, None
        if jvm is not None:
            jvm.end()

    async def aside(self, jvm: Jvm, call: Callable[[], T]) -> T:
        """Make a call of the JVM in a thread; raises InfrastructureError."""

        def guarded() -> T:
            with _failing_as_infrastructure(jvm):
                return call()

        return await asyncio.get_running_loop().run_in_executor(self._threads, guarded)

    def _interface(self, jvm: Jvm) -> Any:
        if jvm.idle:
            return jvm.idle.pop()
        interface = jvm.gateway.jvm.textworldexpress.runtime.PythonInterface()
        wrong = interface.load(self._name, self._parameters)
        if wrong:
            raise ConfigurationError(f"environment.options: {self._name} refuses its parameters: {wrong}")
        return interface

    def _started(self) -> Jvm:
        with self._lock:
            if self._jvm is None or not self._jvm.alive:
                if self._jvm is not None:
                    self._jvm.end()
                self._jvm = Jvm(os.pathsep.join((self._py4j_jar, self._jar)), Path(self._jar).parent)
            return self._jvm


class Jvm:
    """A Java process with a py4j gateway in it."""

    def __init__(self, class_path: str, folder: Path) -> None:
        """Start it and wait for its address; raises InfrastructureError."""
        from py4j.java_gateway import GatewayParameters, JavaGateway

        command = ["java", HEAP, "-XX:+UseSerialGC", "-cp", class_path, "py4j.GatewayServer"]
        self._process = subprocess.Popen(
            [*command, "--die-on-broken-pipe", "--enable-auth", "0"],
            # The games read their lists of objects from where they are started.
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            port, token = self._lines(2)
        except InfrastructureError:
            self._kill()
            raise
        parameters = GatewayParameters(
            port=int(port),
            auth_token=token,
            read_timeout=CALL_S,
            # Else whatever the garbage collector finds here is let go of there, over a socket, at any time.
            enable_memory_management=False,
        )
        self.gateway = JavaGateway(gateway_parameters=parameters)
        self.idle: list[Any] = []
        """Interfaces that no episode plays with, their game loaded."""
        self.broken = False

    @property
    def alive(self) -> bool:
        """Whether it may be asked."""
        return not self.broken and self._process.poll() is None

    def end(self) -> None:
        """Kill it: nothing in it is worth keeping."""
        self.gateway.close(keep_callback_server=True)
        self._kill()

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait(timeout=END_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _lines(self, count: int) -> list[str]:
        """Return the first lines it says."""
        assert self._process.stdout is not None
        out, said, until = self._process.stdout.fileno(), b"", time.monotonic() + START_S
        with selectors.DefaultSelector() as speaking:
            speaking.register(out, selectors.EVENT_READ)
            while said.count(b"\n") < count:
                ready = speaking.select(timeout=max(0.0, until - time.monotonic()))
                more = os.read(out, 4096) if ready else b""
                if not more:
                    what = "ended" if ready else f"did not say where it listens within {START_S:g} s"
                    raise InfrastructureError(f"java: the process {what}")
                said += more
        return said.decode().splitlines()[:count]


@contextmanager
def _failing_as_infrastructure(jvm: Jvm) -> Iterator[None]:
    """Name what failed, and give up the JVM in which it did; what the game itself raises passes through."""
    from py4j.protocol import Py4JError, Py4JJavaError

    try:
        yield
    except Py4JJavaError:
        raise
    except (Py4JError, OSError, json.JSONDecodeError) as error:
        jvm.broken = True
        log.warning("java: %s: %s", type(error).__name__, error)
        raise InfrastructureError(f"java: {type(error).__name__} {str(error)[:200]}") from error


def _without_loops(path: Sequence[str], rooms: Sequence[str], *, doors: bool) -> tuple[str, ...]:
    """Return a path without ways that lead back to where they began.

    rooms: before each command and, as far as they are known, behind the last one; doors: whether a way on
    which doors were opened may go too.
    """
    kept: list[str] = []
    before: list[str] = []
    for command, room, after in zip(path, rooms, rooms[1:], strict=False):
        kept.append(command)
        before.append(room)
        start = len(kept)
        while start and kept[start - 1].startswith(("move ", "open door ") if doors else "move "):
            start -= 1
            if after and before[start] == after and kept[start].startswith("move "):
                del kept[start:], before[start:]
                break
    return (*kept, *path[len(rooms) - 1 :])


def _room(account: dict[str, Any]) -> str:
    """Return where an account says one is, or ""."""
    found = re.search(r"You are in (?:the |a |an )?([\w ]+)", str(account["observation"]))
    return found[1] if found else ""


def _worth(path: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
    return len(path), path


def _decoded(text: str) -> dict[str, Any]:
    account: dict[str, Any] = json.loads(text)
    return account


def _jars() -> tuple[str, str]:
    require("textworld", "textworld_express", "py4j", by="environment textworld")
    from py4j.java_gateway import find_jar_path
    from textworld_express.constants import JAR_PATH

    if shutil.which("java") is None:
        raise ConfigurationError(
            "environment.name: textworld needs Java, expected the program java on PATH, found none; install "
            "a Java runtime (Debian: apt-get install default-jre-headless)"
        )
    return str(JAR_PATH), str(find_jar_path())
