"""Floor 5. Episodes of an audit: played in the loop of training, with the environment watched from inside it.

What differs from training: no tokenizer and no limit of tokens, no latency added, no waits between retries,
and episodes that take longer than TIMEOUT_S are ended.
"""

from __future__ import annotations

import asyncio
import math
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from slipstream.config import RunConfig
from slipstream.environment_audit.episode import Episode, Watched, WatchedResumable
from slipstream.environment_audit.letters import Letters
from slipstream.environments import EnvironmentFactory, Play, environment_factory
from slipstream.episodes import EpisodeRunner
from slipstream.interfaces import Environment, Resumable, ToolSpec
from slipstream.redaction import Redactor
from slipstream.rewards import reward
from slipstream.types import (
    Completion,
    Int32Array,
    Lease,
    Outcome,
    Sampling,
    Split,
    Task,
    TaskAttempt,
)

TIMEOUT_S: Final = 4.0
"""Most seconds of an episode, and of its judgement."""
FAILURES: Final = 0.5
"""Least share of calls that fail where failures must repeat, if any are configured."""
MOST_TOKENS: Final = 1 << 26
LOOKED: Final = 12
"""Openings from which it is learned which tools there are."""
MOST_OVERDUE: Final = 3
"""So many episodes that do not end are enough to give up."""

Player = Callable[[Task, Sequence[ToolSpec]], Play]
"""Plays a task with the tools that its opening offers."""


class Blocked(BaseException):
    """A call of the environment neither returned nor waited: nothing else in its process can run."""


class Stage:
    """Plays the episodes of one audit, and keeps what happened in them."""

    def __init__(self, config: RunConfig, *, episodes: int, seed: int, threshold: float = 0.1) -> None:
        """Make nothing yet; `episodes` of each kind are wanted, of tasks that `seed` chooses.

        threshold: success, as a share of the oracle's, up to which a policy that knows nothing is borne.
        """
        longest = min(config.environment.timeout_s, TIMEOUT_S)
        update = {"max_tokens": MOST_TOKENS, "timeout_s": longest, "tool_latency_s": 0.0, "backoff_s": 0.0}
        self.environment = config.environment.model_copy(update=update)
        self.rewards = config.rewards
        self.wanted, self.seed, self.threshold = episodes, seed, threshold
        self.episodes: list[Episode] = []
        self.overdue = 0
        self.until_s = math.inf
        """When not even the first episode of a check may begin, on the monotonic clock."""
        self.tools: Sequence[ToolSpec] = ()
        """All that the first openings offer, by name."""
        self.places: dict[str, int] = {}
        """The task in whose opening each tool was seen first."""
        self.doubled = False
        """Whether an opening offers two tools of one name."""
        self.converses = False
        self.resumable = False
        self.secrets: tuple[str, ...] = ()
        self.enders: Sequence[ToolSpec] = ()
        """Tools whose call ends the episode."""
        self.oracle: float | None = None
        """Success of the oracle; None while it is not known, or there is none."""
        self.exploited = False
        """Whether a constant answer is paid: then it is no news that others are, who give it among others."""
        self.repeats = True
        """Whether the same attempt goes the same way twice; True until it is known not to."""
        self._redactor = Redactor.of_process(self.environment.canaries)
        self._made: dict[tuple[float, bool], EnvironmentFactory] = {}

    def factory(self, failures: float = 0.0, *, second: bool = False) -> EnvironmentFactory:
        """Return the environment's factory, its tools failing at that rate.

        second: one that shares nothing with the first, as in another process.
        """
        key = (failures, second)
        if key not in self._made:
            update = {"tool_failure_rate": failures}
            changed = self.environment.model_copy(update=update)
            self._made[key] = environment_factory(changed, self.rewards)
        return self._made[key]

    @property
    def failing(self) -> float:
        """How often tools fail in what is played again: often, if any are to fail."""
        share = self.environment.tool_failure_rate
        return max(share, FAILURES) if share else 0.0

    async def look(self) -> str:
        """Learn what environments offer in a few openings; return what went wrong, or ""."""
        offered: dict[str, ToolSpec] = {}

        async def looked() -> None:
            made = self.factory()
            for number in range(min(LOOKED, self.wanted)):
                inner, index = made.make(), self.index(number)
                watched = Watched(inner, self.blank("opened", index))
                try:
                    await watched.reset(made.tasks.task(Split.TRAIN, index), watched.attempt)
                finally:
                    await watched.close()
                for tool in inner.tools:
                    offered.setdefault(tool.name, tool)
                    self.places.setdefault(tool.name, index)
                self.doubled |= len({tool.name for tool in inner.tools}) < len(inner.tools)
                self.resumable = isinstance(inner, Resumable)
                self.secrets = tuple(inner.secrets) if isinstance(inner, Resumable) else ()
                self.converses = watched.converses

        fault = await self.guarded(looked)
        self.tools = tuple(offered.values())
        return fault

    def blank(self, policy: str, index: int, attempt: int = 0, split: Split = Split.TRAIN) -> Episode:
        """Return an episode that has not begun."""
        identity = TaskAttempt(task=index, seed=self.seed, group=index, attempt=attempt)
        return Episode(policy=policy, split=split, attempt=identity)

    @property
    def hopeless(self) -> bool:
        """Whether so many episodes did not end that no more are played."""
        return self.overdue >= MOST_OVERDUE

    def close(self) -> None:
        """End what its environments share."""
        for made in self._made.values():
            made.close()

    def index(self, number: int) -> int:
        """Return the task of the `number`th episode of a kind."""
        return self.seed * self.wanted + number

    async def play(
        self,
        policy: str,
        player: Player,
        index: int,
        *,
        attempt: int = 0,
        split: Split = Split.TRAIN,
        factory: EnvironmentFactory | None = None,
        make: Callable[[], Environment] | None = None,
    ) -> Episode:
        """Play one episode to whatever end; nothing that the environment does is raised from here."""
        made = factory or self.factory()
        episode, seen = self.blank(policy, index, attempt, split), list[Watched]()

        def watched() -> Environment:
            inner = (make or made.make)()
            seen.append((WatchedResumable if isinstance(inner, Resumable) else Watched)(inner, episode))
            return seen[-1]

        runner = EpisodeRunner(
            factory=made,
            chat=Letters(),
            environment=self.environment,
            rewards=self.rewards,
            redactor=self._redactor,
        )

        async def played() -> None:
            task, lease = made.tasks.task(split, index), Lease(attempt=episode.attempt, split=split)
            speak = _speaker(lambda: player(task, seen[-1].tools), runner.chat.message)
            done = await runner.run(lease, speak, Sampling(max_tokens=MOST_TOKENS), make=watched)
            episode.scores, episode.outcome, episode.note = done.scores, done.outcome, done.note
            if episode.outcome is not Outcome.INFRASTRUCTURE_FAILURE:
                episode.reward = reward(done.scores, self.rewards)

        episode.fault = await self.guarded(played)
        self.episodes.append(episode)
        return episode

    async def opened(self, episode: Episode) -> str:
        """Only reset an episode's environment; return what went wrong, or ""."""
        made = self.factory()

        async def opening() -> None:
            watched = Watched(made.make(), episode)
            try:
                await watched.reset(made.tasks.task(episode.split, episode.attempt.task), episode.attempt)
            finally:
                await watched.close()

        return await self.guarded(opening)

    async def guarded(self, work: Callable[[], Any]) -> str:
        """Run a coroutine function of the environment's; return what went wrong in a line, or ""."""
        grace_s = min(1.0, self.environment.timeout_s)
        limit_s = 2 * self.environment.timeout_s + grace_s
        task = asyncio.ensure_future(work())
        # Waits that are awaited end by their own limit, before the alarm.
        with _alarm(limit_s + grace_s):
            await asyncio.wait({task}, timeout=limit_s)
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=grace_s)
            self.overdue += 1
            return f"no end within {limit_s:g} s"
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Blocked):
            self.overdue += 1
            where = _where(error)
            return f"blocked its whole process for {limit_s:g} s{where}: waits must be awaited"
        return "" if error is None else f"{type(error).__name__}: {error}"[:300] + _where(error)


def _speaker(
    begin: Callable[[], Play], written: Callable[[str], Int32Array]
) -> Callable[[Int32Array, str], Any]:
    """Let a script speak; when it has nothing more to say it says nothing, until the episode ends."""
    plays: list[Play] = []

    async def speak(tokens: Int32Array, observation: str) -> Completion:
        try:
            if plays:
                text = plays[0].send(observation)
            else:
                plays.append(begin())
                text = next(plays[0])
        except StopIteration:
            text = ""
        said = written(text)
        blank = np.zeros(len(said), dtype=np.float32)
        return Completion(
            token_ids=said, logprobs=blank, versions=np.full(len(said), -1, np.int32), stopped=True
        )

    return speak


def _where(error: BaseException) -> str:
    """Return the last place of an error outside of the audit and of Python's library, if there is one."""
    own = __file__.rpartition("/")[0]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        place = frame.filename
        if not place.startswith(own) and "/lib/python" not in place and place[0] != "<":
            return f" ({place.rpartition('/')[2]}:{frame.lineno} in {frame.name})"
    return ""


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise Blocked where Python is when the body has not ended in time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise Blocked

    before = signal.signal(signal.SIGALRM, ring)
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    began = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 0.01), every)
