"""Floor 5. Does the same happen again: in new objects, in another process, from a state that travelled?"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import msgspec

from slipstream.environment_audit import players
from slipstream.environment_audit.episode import Episode
from slipstream.environment_audit.stage import Player, Stage
from slipstream.environment_audit.trials import early, spent, transcripts
from slipstream.environment_audit.verdicts import Digest, Level, Verdict
from slipstream.environments import EnvironmentFactory
from slipstream.environments.factory import ORACLE
from slipstream.interfaces import AssistantMessage, Environment, Observation, Transition
from slipstream.types import Score, Task, TaskAttempt

ATTEMPTS: Final = 8
TASKS: Final = 4
UNCOMPARED: Final = "not compared: in each pair of episodes the ground failed or time was over"


def cast(stage: Stage, factory: EnvironmentFactory) -> list[tuple[str, Player]]:
    """Return the policies that are played again: the oracle, if there is one, and random calls."""
    script = factory.scripts.get(ORACLE)
    random = players.at_random(str(stage.seed), converses=stage.converses)
    return [*([("oracle", players.scripted(script))] if script else []), ("random calls", random)]


async def determinism(stage: Stage, until: float) -> Verdict:
    """Does one attempt go the same way twice, in objects that share nothing?"""
    first, second = stage.factory(stage.failing), stage.factory(stage.failing, second=True)
    tried, compared, wanted = 0, 0, 2 * len(cast(stage, first)) * max(1, stage.wanted // 2)
    differing: list[tuple[Episode, Episode]] = []
    for number in range(max(1, stage.wanted // 2)):
        for (policy, script), (_, again) in zip(cast(stage, first), cast(stage, second), strict=True):
            for attempt in (0, 1):
                if spent(stage, until, tried):
                    continue
                tried += 1
                index = stage.index(number)
                one = await stage.play(policy, script, index, attempt=attempt, factory=first)
                other = await stage.play(policy, again, index, attempt=attempt, factory=second)
                if not (one.grounded and other.grounded):
                    continue
                compared += 1
                if one.difference(other):
                    differing.append((one, other))
    stage.repeats = not differing
    sentence = (
        f"{compared} episodes played twice in fresh objects give equal observations, rewards and scores"
    )
    if differing:
        one, other = differing[0]
        sentence = (
            f"{len(differing)} of {compared} episodes played twice differ, the first in its "
            f"{one.difference(other)} ({one.name}): draw everything from the attempt"
        )
    level = Level.FAIL if differing else Level.PASS
    if tried and not compared:
        level, sentence = (
            Level.WARN,
            "not compared: in each pair of episodes the ground failed or time was over",
        )
    return Verdict(
        check="determinism",
        level=level,
        sentence=sentence,
        early=early(compared, wanted),
        evidence=transcripts(differing[0]) if differing else (),
    )


async def attempts(stage: Stage, until: float) -> Verdict:
    """Do the failures of tools differ between the attempts of a group?"""
    if not stage.failing:
        return Verdict(check="attempts", level=Level.PASS, sentence="no tool is made to fail")
    calm, stormy = stage.factory(0.0), stage.factory(stage.failing)
    policy, script = cast(stage, stormy)[0]
    failed = list[Episode]()
    level, sentence, count = Level.PASS, "environment.tool_failure_rate makes nothing fail here", 0
    for number in range(TASKS):
        index, without, failed = stage.index(number), list[Episode](), list[Episode]()
        for attempt in range(ATTEMPTS):
            if not spent(stage, until, attempt // 2):
                without.append(await stage.play(policy, script, index, attempt=attempt, factory=calm))
                failed.append(await stage.play(policy, script, index, attempt=attempt, factory=stormy))
        count += len(failed)
        # Another task is tried only where nothing failed by chance.
        if any(a.difference(b) for a, b in zip(without, failed, strict=True)):
            ways = len({_fingerprint(episode) for episode in failed})
            sentence = f"tools that fail do so in {ways} ways in {len(failed)} attempts at one task"
            if ways == 1 and len(failed) > 1:
                level = Level.FAIL
                sentence = (
                    f"tools fail alike in all {len(failed)} attempts at one task: key failures by the whole "
                    "attempt, not by the task"
                )
            break
    return Verdict(
        check="attempts",
        level=level,
        sentence=sentence,
        early=early(count, ATTEMPTS) if len(failed) < ATTEMPTS else "",
        evidence=transcripts(failed[:2]) if level is Level.FAIL else (),
    )


async def digests(stage: Stage, until: float) -> list[Digest]:
    """Return a few episodes as any process must play them."""
    factory, found = stage.factory(stage.failing), []
    for number in range(max(1, stage.wanted // 4)):
        for policy, script in cast(stage, factory):
            if not spent(stage, until):
                episode = await stage.play(policy, script, stage.index(number), factory=factory)
                if not episode.grounded:
                    continue
                found.append(
                    Digest(
                        name=episode.name,
                        transcript=episode.transcript(),
                        fingerprint=_fingerprint(episode),
                    )
                )
    return found


def processes(own: Sequence[Digest], others: Sequence[Digest], *, repeats: bool) -> Verdict:
    """Judge the same episodes of two processes whose hashes of strings differ."""
    if not repeats:
        sentence = "not compared: episodes differ within one process already"
        return Verdict(check="processes", level=Level.WARN, sentence=sentence)
    theirs = {digest.name: digest for digest in others}
    pairs = [(digest, theirs[digest.name]) for digest in own if digest.name in theirs]
    differing = [(a, b) for a, b in pairs if a.fingerprint != b.fingerprint]
    sentence = f"{len(pairs)} episodes are the same in a process with other hashes of strings"
    if differing:
        sentence = (
            f"{len(differing)} of {len(pairs)} episodes differ in another process ({differing[0][0].name}): "
            "look for the order of a set, for hash(), for the time, for something that is drawn once"
        )
    elif not pairs:
        sentence = "not compared: the other process gave no episode in time"
    level = Level.FAIL if differing else Level.PASS if pairs else Level.WARN
    shown = tuple(digest.transcript for digest in differing[0]) if differing else ()
    return Verdict(check="processes", level=level, sentence=sentence, evidence=shown)


def _fingerprint(episode: Episode) -> str:
    return f"{zlib.crc32(repr(episode.essence()).encode('utf-8', 'backslashreplace')):08x}"


class _Moving:
    """An environment that moves into a new object before every message, as if each had a process of its own.

    What plays never gets the secrets; what judges does.
    """

    def __init__(self, make: Callable[[], Environment], trouble: list[str]) -> None:
        self._make, self._trouble = make, trouble
        self._inner: Any = make()
        self.tools, self.converses = self._inner.tools, getattr(self._inner, "converses", False)

    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        public = {key: value for key, value in task.data.items() if key not in self._inner.secrets}
        self._task, self._blind, self._attempt = task, replace(task, data=public), attempt
        opening: Observation = await self._inner.reset(self._blind, attempt)
        self.tools = self._inner.tools
        return opening

    async def step(self, message: AssistantMessage) -> Transition:
        await self._move(self._blind)
        state = self._inner.state()
        before = _sent(state)
        transition: Transition = await self._inner.step(message)
        self.tools = self._inner.tools
        if _sent(state) != before:
            self._trouble.append("a state that was given changes with the next step: return a copy")
        return transition

    async def score(self) -> Sequence[Score]:
        await self._move(self._task)
        scores: Sequence[Score] = await self._inner.score()
        return scores

    async def close(self) -> None:
        if hasattr(self._inner, "close"):
            await self._inner.close()

    async def _move(self, task: Task) -> None:
        wire = _sent(self._inner.state())
        await self.close()
        self._inner = self._make()
        await self._inner.restore(task, self._attempt, msgspec.msgpack.decode(wire))


def _sent(state: Any) -> bytes:
    return msgspec.msgpack.encode(state)


async def resumable(stage: Stage, until: float) -> Verdict:
    """Does an episode go on from a state that went over the wire, as if nothing had happened?"""
    if not stage.resumable:
        return Verdict(
            check="resumable",
            level=Level.WARN,
            sentence="it has no secrets, state and restore: it cannot run in a sandbox, and a step whose "
            "ground failed costs the episode",
        )
    factory, trouble = stage.factory(stage.failing), list[str]()
    differing: list[tuple[Episode, Episode]] = []
    tried, count, wanted = 0, 0, max(1, stage.wanted // 2)
    for number in range(wanted):
        for policy, script in cast(stage, factory):
            if spent(stage, until, tried) or not stage.repeats:
                continue
            tried += 1
            straight = await stage.play(policy, script, stage.index(number), factory=factory)
            moved = await stage.play(
                f"{policy}, moved",
                script,
                stage.index(number),
                factory=factory,
                make=_mover(factory, trouble),
            )
            if not (straight.grounded and moved.grounded):
                continue
            count += 1
            if straight.difference(moved):
                differing.append((straight, moved))
    if not stage.repeats:
        sentence = "not compared: episodes differ without it already"
        return Verdict(check="resumable", level=Level.WARN, sentence=sentence)
    level, sentence = (
        Level.PASS,
        f"{count} episodes that moved before every message ended like those that stayed",
    )
    if differing:
        straight, moved = differing[0]
        what = moved.fault or f"its {straight.difference(moved)} is another"
        level = Level.FAIL
        sentence = (
            f"{len(differing)} of {count} episodes that moved went another way: {what} ({straight.name})"
        )
    elif trouble:
        level, sentence = Level.FAIL, trouble[0]
    elif tried and not count:
        level, sentence = (
            Level.WARN,
            "not compared: in each pair of episodes the ground failed or time was over",
        )
    return Verdict(
        check="resumable",
        level=level,
        sentence=sentence,
        early=early(count, wanted * len(cast(stage, factory))),
        evidence=transcripts(differing[0]) if differing else (),
    )


def _mover(factory: EnvironmentFactory, trouble: list[str]) -> Callable[[], Environment]:
    return lambda: _Moving(factory.make, trouble)
