"""Floor 4. Environments of other frameworks, in worker processes with an interpreter of their own.

    actor     task -> reset ... message -> step ... -> score          one call after the other per episode
                        │                    │            │           many episodes in one worker
    worker    worker.py, of_KIND.py, the package with all its pins    its own interpreter, its own group

what happens                                        becomes
the environment raises in a step                    a standard error, which the policy reads; it goes on
a step takes longer than limits.call_timeout_s      a failed outcome; the worker takes no new episodes
it raises when it scores, or its reward is no number    no score: the episode leaves its baseline
the worker dies, or answers nothing any more        an infrastructure failure of all episodes it held
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from slipstream.environments.adapters.foreign import PONG_S, CallTimeout, Foreign, Frames
from slipstream.errors import InfrastructureError, SlipstreamError, ToolError

WORKER: Final = Path(__file__).with_name("worker.py")
CLOSE_S: Final = 5.0
"""For an episode to let go of what it holds."""
_ENVELOPE_BYTES: Final = 4 << 10
"""What our worker's own answers have beside what is limited."""

log = logging.getLogger(__name__)


class Refused(SlipstreamError):
    """A worker cannot open what it was asked for; `kind` is "package" or "entry"."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a worker is to serve."""

    kind: str
    python: str
    entry: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    path: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    answer_bytes: int = 1 << 20
    start_s: float = 120.0
    episodes_per_worker: int = 0
    """0: all of them in one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a worker says it serves."""

    tools: list[dict[str, Any]]
    questions: list[str] | None
    converses: bool
    concurrent: bool
    """Whether it says that many of its episodes may share a process."""
    versions: dict[str, str]


@dataclass(slots=True, kw_only=True, eq=False)
class Host:
    """One worker and what it holds."""

    life: Foreign
    episodes: set[int] = field(default_factory=set)
    retired: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """An episode in a worker."""

    host: Host
    number: int


class Bridge:
    """Workers of one environment. Its methods run on the loop of `foreign`.

    Tools stay as the first worker described them: a run's prompts are made of them.
    """

    def __init__(self, opening: Opening) -> None:
        """Start nothing yet."""
        self._opening = opening
        self._hosts: list[Host] = []
        self._numbers = itertools.count(1)
        self._first: Description | None = None
        self._changed = False
        self._starting = asyncio.Lock()
        # A bridge that nobody closes ends with the last who knows of it.
        weakref.finalize(self, _kill_all, self._hosts)

    def pids(self) -> list[int]:
        """Return the process groups of the workers that live."""
        return [host.life.pid for host in self._hosts if not host.life.ended]

    async def described(self) -> Description:
        """Start a worker and return what it serves; raises Refused and InfrastructureError."""
        if self._first is None:
            self._hosts.append(await self._started())
        assert self._first is not None
        return self._first

    async def reset(self, task: Mapping[str, Any], seed: int, seconds: float) -> tuple[Held, dict[str, Any]]:
        """Begin an episode; returns it and what it opens with. Raises InfrastructureError."""
        host = await self._free()
        held = Held(host=host, number=next(self._numbers))
        host.episodes.add(held.number)
        try:
            return held, await self.call(held, "reset", seconds, task=dict(task), seed=seed)
        except (ToolError, CallTimeout) as error:
            await self.close(held)
            why = f"no end within {seconds:g} s" if isinstance(error, CallTimeout) else str(error)
            raise InfrastructureError(f"{host.life.name}: reset: {why}") from None
        except BaseException:
            await self._forget(held)
            raise

    async def call(self, held: Held, method: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        """Ask an episode for something.

        Raises ToolError when the environment raises, CallTimeout when it does not return in time, and
        InfrastructureError when its worker ends or answers nothing at all.
        """
        life = held.host.life
        try:
            answer = await life.call({"method": method, "episode": held.number, **arguments}, seconds)
        except CallTimeout:
            # The thread that hangs cannot be ended; the others of this worker may go on.
            held.host.retired = True
            await self._expect_pong(life)
            raise
        if "error" in answer:
            raise ToolError(_sentence(answer["error"]))
        value = answer.get("value")
        return value if isinstance(value, dict) else {}

    async def close(self, held: Held) -> None:
        """Let go of an episode, and of its worker when that was retired and holds no other."""
        if held.number not in held.host.episodes:
            return
        try:
            if not held.host.life.ended:
                await self.call(held, "close", CLOSE_S)
        except (ToolError, CallTimeout, InfrastructureError) as error:
            log.warning("%s: close: %s", held.host.life.name, error)
        finally:
            await self._forget(held)

    async def end(self) -> None:
        """Kill all workers with all they started."""
        hosts = [*self._hosts]
        self._hosts.clear()
        for host in hosts:
            await host.life.close()

    async def _forget(self, held: Held) -> None:
        host = held.host
        host.episodes.discard(held.number)
        if host.retired and not host.episodes and host in self._hosts:
            self._hosts.remove(host)
            await host.life.close()

    async def _free(self) -> Host:
        """Return a worker with room, or a new one; where all episodes share one, only one is started."""
        if self._opening.episodes_per_worker:
            return await self._roomy()
        async with self._starting:
            return await self._roomy()

    async def _roomy(self) -> Host:
        dead = [host for host in self._hosts if host.life.ended]
        for host in dead:
            log.warning("%s; starting another", host.life.ended)
            self._hosts.remove(host)
        most = self._opening.episodes_per_worker
        for host in self._hosts:
            if not host.retired and (not most or len(host.episodes) < most):
                return host
        try:
            host = await self._started()
        except Refused as error:
            raise InfrastructureError(
                f"{self._opening.kind} worker: {self._opening.entry}: {error}"
            ) from None
        self._hosts.append(host)
        return host

    async def _started(self) -> Host:
        opening = self._opening
        life = await Foreign.start(
            [opening.python, "-I", str(WORKER)],
            name=f"{opening.kind} worker",
            framing=Frames(),
            most_bytes=opening.answer_bytes + _ENVELOPE_BYTES,
            variables=opening.variables,
        )
        try:
            answer = await life.call(
                {
                    "method": "open",
                    "kind": opening.kind,
                    "entry": opening.entry,
                    "arguments": dict(opening.arguments),
                    "path": list(opening.path),
                    "most": opening.answer_bytes,
                },
                opening.start_s,
            )
            if "error" in answer:
                raise Refused(answer["error"]["kind"], answer["error"]["text"])
            self._compare(Description(**answer["value"]))
        except CallTimeout:
            await life.close()
            raise InfrastructureError(
                f"{life.name}: {opening.entry} was not there within {opening.start_s:g} s"
            ) from None
        except BaseException:
            await life.close()
            raise
        return Host(life=life)

    async def _expect_pong(self, life: Foreign) -> None:
        """Tell a worker in which one call hangs from one that hangs: that one is killed."""
        try:
            await life.call({"method": "ping"}, PONG_S)
        except CallTimeout:
            life.end(f"answered nothing for {PONG_S:g} s and was killed")
            raise InfrastructureError(life.ended) from None

    def _compare(self, described: Description) -> None:
        """Keep the first description; say once when that of a later worker differs."""
        first = self._first = self._first or described
        if described == first or self._changed:
            return
        self._changed = True
        parts = ("tools", "questions", "converses", "concurrent", "versions")
        changed = [part for part in parts if getattr(first, part) != getattr(described, part)]
        log.warning(
            "%s %s: in mid-run it changed its %s; the run keeps those it began with",
            self._opening.kind,
            self._opening.entry,
            " and ".join(changed),
        )


def _kill_all(hosts: list[Host]) -> None:
    for host in hosts:
        host.life.kill()


def _sentence(error: Mapping[str, Any]) -> str:
    """Return what the policy may read of a worker's error."""
    if error.get("kind") == "oversized":
        return "environment answered too much"
    return f"environment failed with {error.get('text')}"
