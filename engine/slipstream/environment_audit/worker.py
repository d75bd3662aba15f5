"""Floor 5. The process in which an audit's episodes are played; it answers with lines in a file.

Nothing it does can harm who reads them: an environment may print, block, exit or crash.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec

from slipstream import config as configuration
from slipstream.environment_audit import books, form, leaks, repetition, trials
from slipstream.environment_audit.stage import Stage
from slipstream.environment_audit.verdicts import (
    Begun,
    Digest,
    Done,
    Level,
    Message,
    Refusal,
    Verdict,
    plain,
)
from slipstream.errors import SlipstreamError
from slipstream.process import guard_parent

Check = Callable[[Stage, float], Awaitable[Verdict]]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is asked for."""

    config: str
    """File of the configuration."""
    answer: str
    """File that it appends its lines to."""
    episodes: int
    seed: int
    threshold: float
    until_s: float
    """When it must have ended, on the monotonic clock that processes of a machine share."""
    parent: int
    digests_only: bool


CHECKS: Final[tuple[tuple[str, Check, float], ...]] = (
    ("schemas", form.schemas, 3.0),
    ("tasks", form.tasks, 4.0),
    ("oracle", trials.oracle, 5.0),
    ("failures", trials.failures, 3.0),
    ("do_nothing", trials.do_nothing, 2.0),
    ("constants", trials.constants, 9.0),
    ("random", trials.at_random, 4.0),
    ("crash", trials.crash, 5.0),
    ("slow", trials.slow, 3.0),
    ("determinism", repetition.determinism, 4.0),
    ("attempts", repetition.attempts, 2.0),
    ("resumable", repetition.resumable, 3.0),
    ("leaks", leaks.leaks, 2.0),
    ("speed", books.speed, 2.0),
    ("rewards", books.rewards, 1.0),
    ("observations", books.observations, 1.0),
    ("errors", books.errors, 1.0),
)
"""Name, work, and the most seconds it may begin episodes in."""
PROCESSES: Final = "processes"
"""The check that needs two workers, and is judged by who started them."""
NAMES: Final = (*(name for name, _, _ in CHECKS), PROCESSES)
_LEFT_S: Final = 1.5
"""Kept for the end of a check that has begun its last episode."""


def main(arguments: list[str]) -> int:
    """Do the job that the only argument describes as JSON."""
    job = msgspec.json.decode(arguments[0], type=Job)
    guard_parent(job.parent)
    with Path(job.answer).open("ab", buffering=0) as answer:
        return _work(job, lambda message: answer.write(msgspec.json.encode(message) + b"\n"))


def _work(job: Job, say: Callable[[Message], object]) -> int:
    try:
        config = configuration.read(Path(job.config))
        stage = Stage(config, episodes=job.episodes, seed=job.seed, threshold=job.threshold)
        versions = dict(stage.factory().versions)
    except SlipstreamError as error:
        say(Message(refusal=Refusal(error=plain(str(error)), exit_code=error.exit_code)))
        return 0
    say(Message(versions=versions))
    asyncio.run(_serve(stage, job, say))
    say(Message(done=Done()))
    stage.close()
    return 0


async def _serve(stage: Stage, job: Job, say: Callable[[Message], object]) -> None:
    if fault := await stage.look():
        if not job.digests_only:
            sentence = f"no environment can be made: {plain(fault)}"
            say(Message(verdict=Verdict(check="errors", level=Level.FAIL, sentence=sentence)))
        return
    if not job.digests_only:
        await audit(stage, say, job.until_s)
    stage.until_s = job.until_s
    found: list[Digest] = []

    async def digests() -> None:
        found.extend(await repetition.digests(stage, job.until_s - _LEFT_S))

    await stage.guarded(digests)
    for digest in found:
        say(Message(digest=digest))


async def _second(stage: Stage) -> None:
    stage.factory(stage.failing, second=True)


async def audit(stage: Stage, say: Callable[[Message], object], until_s: float) -> None:
    """Run all checks; what one takes longer than its time is taken from those that come last."""
    stage.until_s = until_s - _LEFT_S
    # Before the first check, whose time is not for that.
    await stage.guarded(lambda: _second(stage))
    for position, (name, check, most_s) in enumerate(CHECKS):
        say(Message(begun=Begun(check=name)))
        began = time.monotonic()
        later_s = sum(seconds for _, _, seconds in CHECKS[position + 1 :])
        # All together may take longer than there is: a check's time is its share of what is left.
        share_s = most_s * min(1.0, max(0.0, until_s - began - _LEFT_S) / (most_s + later_s))
        verdict = await judged(stage, name, check, began + share_s)
        seconds = round(time.monotonic() - began, 3)
        early = verdict.early or ("too many episodes had no end" if stage.hopeless else "")
        say(Message(verdict=_told(msgspec.structs.replace(verdict, seconds=seconds, early=early))))


async def judged(stage: Stage, name: str, check: Check, until_s: float) -> Verdict:
    """Run one check; an error in it is its verdict."""
    answers: list[Verdict] = []

    async def work() -> None:
        answers.append(await check(stage, until_s))

    task = asyncio.ensure_future(work())
    # Whatever a check awaits of an environment has its own limit.
    await asyncio.wait({task}, timeout=max(60.0, until_s - time.monotonic()))
    if answers:
        return answers[0]
    error = task.exception() if task.done() and not task.cancelled() else "no end"
    sentence = f"the check itself failed: {type(error).__name__}: {error}"
    return Verdict(check=name, level=Level.FAIL, sentence=plain(sentence)[:500])


def _told(verdict: Verdict) -> Verdict:
    """Return a verdict as one line; what has seen nothing has not passed."""
    nothing = verdict.level is Level.PASS and verdict.early.startswith(f"{trials.STOPPED} 0 ")
    return msgspec.structs.replace(
        verdict,
        level=Level.WARN if nothing else verdict.level,
        sentence=plain(" ".join(verdict.sentence.split())),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
