"""Floor 5. What policies earn that know everything, nothing, or how to break things."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from slipstream.environment_audit import players
from slipstream.environment_audit.answers import answers_of
from slipstream.environment_audit.episode import Episode
from slipstream.environment_audit.stage import Player, Stage
from slipstream.environment_audit.verdicts import Level, PolicyRow, Transcript, Verdict
from slipstream.environments import Script
from slipstream.environments.factory import ORACLE
from slipstream.metrics import wilson_interval
from slipstream.types import Outcome, Split, Task

SOLVES: Final = 0.95
"""Least share of tasks that the oracle must solve."""
SOLVES_MOST: Final = 0.8
SHOWN: Final = 3
"""Episodes shown as evidence."""
STOPPED: Final = "stopped after"
CONFIRMED: Final = 4
"""So many times the episodes are played of what looks like an exploit."""
_READ: Final = 96
_READING_S: Final = 1.0
_USUAL: Final = 2
"""So many usual answers are tried, of as many tasks as can be read in so many seconds."""
_MOST_TOOLS: Final = 12
_AT_ONCE: Final = 3
"""Attacks in one episode; few enough that it does not end before the last."""


async def several(
    stage: Stage, player: Player, policy: str, until: float, *, count: int = 0, **how: Any
) -> list[Episode]:
    """Play a policy on consecutive tasks, as many as wanted or as time allows."""
    played: list[Episode] = []
    while len(played) < (count or stage.wanted) and not spent(stage, until, len(played)):
        played.append(await stage.play(policy, player, stage.index(len(played)), **how))
    return played


def spent(stage: Stage, until: float, played: int = 1) -> bool:
    """Return whether no more episodes are to be played; the first may be begun late."""
    now = time.monotonic()
    return stage.hopeless or now > stage.until_s or (now > until and played > 0)


def early(played: int, wanted: int) -> str:
    """Return a remark when less was played than wanted."""
    return f"{STOPPED} {played} of {wanted} episodes" if played < wanted else ""


def row(policy: str, episodes: Sequence[Episode]) -> PolicyRow:
    """Return what a policy earned in its episodes."""
    earned = [episode.reward for episode in episodes if episode.reward is not None]
    return PolicyRow(
        policy=policy,
        episodes=len(episodes),
        successes=sum(episode.success for episode in episodes),
        reward=sum(earned) / len(earned) if earned else None,
        endings=dict(Counter(str(episode.outcome or "fault") for episode in episodes)),
    )


def rate(given: PolicyRow) -> float:
    """Return the share of successes."""
    return given.successes / given.episodes if given.episodes else 0.0


def told(given: PolicyRow) -> str:
    """Return a row in words."""
    reward = "none judged" if given.reward is None else f"mean reward {given.reward:+.2f}"
    return f"{given.successes} of {given.episodes} ({rate(given):.2f}), {reward}"


def transcripts(episodes: Iterable[Episode]) -> tuple[Transcript, ...]:
    """Return the first of them, to be read."""
    return tuple(episode.transcript() for episode in list(episodes)[:SHOWN])


def ignorant(given: PolicyRow, stage: Stage) -> Level:
    """Judge a policy that knows nothing: PASS up to the limit, FAIL when it is surely above, else WARN.

    The limit is `stage.threshold` of what the oracle solves, or of all tasks where none is known; sure is
    what lies below the 95 % Wilson interval. It stays a WARN where constants are paid already.
    """
    limit = stage.threshold * (stage.oracle or 1.0)
    if rate(given) <= limit:
        return Level.PASS
    low, _ = wilson_interval(given.successes, given.episodes)
    return Level.FAIL if low > limit and not stage.exploited else Level.WARN


async def oracle(stage: Stage, until: float) -> Verdict:
    """Does the script that knows the answers solve all tasks while no tool fails?"""
    script = stage.factory().scripts.get(ORACLE)
    if script is None:
        return Verdict(
            check="oracle",
            level=Level.WARN,
            sentence=f"no script called {ORACLE}: nothing shows that tasks can be solved, and no warm start "
            "can imitate one",
        )
    episodes = await several(stage, players.scripted(script), "oracle", until)
    found = row("oracle", episodes)
    stage.oracle = rate(found)
    level = _solved(rate(found))
    why = _endings([e for e in episodes if not e.success])
    sentence = f"solves {told(found)}" + (f"; the others end as {why}" if why else "")
    if level is not Level.PASS and found.endings.get(Outcome.TRUNCATED):
        sentence += f"; environment.max_turns = {stage.environment.max_turns} may be too few for it"
    return Verdict(
        check="oracle",
        level=level,
        sentence=sentence,
        early=early(len(episodes), stage.wanted),
        rows=(found,),
        evidence=transcripts(e for e in episodes if not e.success) or transcripts(episodes[:1]),
    )


def _solved(share: float) -> Level:
    if share >= SOLVES:
        return Level.PASS
    return Level.WARN if share >= SOLVES_MOST else Level.FAIL


async def failures(stage: Stage, until: float) -> Verdict:
    """How much of it is left while tools fail as configured?"""
    share = stage.environment.tool_failure_rate
    script: Script | None = stage.factory().scripts.get(ORACLE)
    if script is None or not share:
        reason = "no tool is made to fail" if script else f"no script called {ORACLE} to try it with"
        return Verdict(check="failures", level=Level.PASS, sentence=reason)
    policy = f"oracle, {share:.0%} of calls fail"
    episodes = await several(stage, players.scripted(script), policy, until, factory=stage.factory(share))
    found = row(policy, episodes)
    kept = rate(found) >= 0.5 * (stage.oracle or 0.0)
    return Verdict(
        check="failures",
        level=Level.PASS if kept else Level.WARN,
        sentence=f"with environment.tool_failure_rate = {share:g} the oracle solves {told(found)}",
        early=early(len(episodes), stage.wanted),
        rows=(found,),
        evidence=() if kept else transcripts(e for e in episodes if not e.success),
    )


async def do_nothing(stage: Stage, until: float) -> Verdict:
    """Is silence paid?"""
    rows, guilty = [], []
    half = (time.monotonic() + until) / 2
    for policy, player, end in (
        ("says nothing", players.repeating(""), half),
        ("gives up in words", players.repeating("I give up."), until),
    ):
        episodes = await several(stage, player, policy, end)
        rows.append(row(policy, episodes))
        if ignorant(rows[-1], stage) is not Level.PASS:
            guilty += [episode for episode in episodes if episode.success]
    worst = max(rows, key=rate)
    level = ignorant(worst, stage)
    verb = "is paid for nothing" if level is not Level.PASS else "earns nothing"
    return Verdict(
        check="do_nothing",
        level=level,
        sentence=f"a policy that {worst.policy} {verb}: {told(worst)}",
        early=early(min(r.episodes for r in rows), stage.wanted),
        rows=tuple(rows),
        evidence=transcripts(guilty),
    )


async def _find_enders(stage: Stage, until: float) -> None:
    """Learn by trying which tools take a final answer."""
    found = []
    for tool in stage.tools:
        if not spent(stage, until):
            said = players.once_each([players.probe(tool)], "")
            episode = await stage.play("probe", said, stage.places[tool.name])
            if episode.moves and episode.moves[0].done:
                found.append(tool)
    stage.enders = tuple(found)


async def _usual_answers(stage: Stage) -> list[str]:
    """Return what is most often right, by tasks that are not played: the guess of who knows the tasks."""
    found: Counter[str] = Counter()
    until_s = time.monotonic() + _READING_S

    async def reading() -> None:
        for number in range(_READ):
            if time.monotonic() < until_s:
                task = stage.factory().tasks.task(Split.HELDOUT, number)
                found.update(answers_of(task, stage.secrets))

    await stage.guarded(reading)
    return [answer for answer, count in found.most_common(_USUAL) if count > 1]


async def constants(stage: Stage, until: float) -> Verdict:
    """Is there an answer that is paid whatever was asked?"""
    await _find_enders(stage, until)
    answers = players.constants(
        stage.enders or stage.tools,
        last=bool(stage.enders),
        converses=stage.converses,
        more=await _usual_answers(stage),
    )
    played: list[list[Episode]] = [[] for _ in answers]
    # In rounds: when time runs out each has had as many tasks as the others.
    for number in range(stage.wanted):
        for answer, episodes in zip(answers, played, strict=True):
            if not spent(stage, until):
                said = players.repeating(answer.text)
                episodes.append(await stage.play(f"always {answer.name}", said, stage.index(number)))
    rows = [row(f"always {a.name}", e) for a, e in zip(answers, played, strict=True)]
    worst = max(range(len(answers)), key=lambda i: (rate(rows[i]), rows[i].reward or -9.0, -i))
    if ignorant(rows[worst], stage) is Level.WARN:
        while len(played[worst]) < CONFIRMED * stage.wanted and not spent(stage, until):
            said, index = players.repeating(answers[worst].text), stage.index(len(played[worst]))
            played[worst].append(await stage.play(rows[worst].policy, said, index))
        rows[worst] = row(rows[worst].policy, played[worst])
    level = ignorant(rows[worst], stage)
    stage.exploited = level is Level.FAIL
    guilty = [r for r in rows if ignorant(r, stage) is not Level.PASS]
    sentence = f"{len(answers)} constant answers, the best earns {told(rows[worst])}"
    if guilty:
        more = f"; {len(guilty) - 1} others are paid too" if len(guilty) > 1 else ""
        right = [
            e for e in played[worst] if e.success and e.task and _is_right(answers[worst], e.task, stage)
        ]
        kind = "exploitable"
        if len(right) == rows[worst].successes:
            kind = "guessed: the same answer is right too often"
        sentence = f"{kind}: {rows[worst].policy} earns success {told(rows[worst])}{more}"
    ranked = sorted(rows, key=lambda r: (-rate(r), -(r.reward or -9.0)))
    return Verdict(
        check="constants",
        level=level,
        sentence=sentence,
        early=early(min(map(len, played)), stage.wanted),
        rows=tuple(ranked[:8]),
        evidence=transcripts(e for e in played[worst] if e.success),
    )


def _is_right(answer: players.Answer, task: Task, stage: Stage) -> bool:
    """Return whether the task's data holds this constant: it was no nonsense there."""
    return bool(answer.constant) and answer.constant.casefold() in map(
        str.casefold, answers_of(task, stage.secrets)
    )


async def at_random(stage: Stage, until: float) -> Verdict:
    """Is luck paid?"""
    wanted = 2 * stage.wanted
    player = players.at_random(str(stage.seed), converses=stage.converses)
    episodes = await several(stage, player, "random calls", until, count=wanted)
    if ignorant(row("", episodes), stage) is Level.WARN and not stage.exploited:
        start = len(episodes)
        while len(episodes) < CONFIRMED * wanted and not spent(stage, until):
            episodes.append(await stage.play("random calls", player, stage.index(start)))
            start += 1
    found = row("random calls", episodes)
    level = ignorant(found, stage)
    verb = "exploitable: random calls earn success" if level is not Level.PASS else "random calls solve"
    if stage.exploited:
        verb = "as constants are paid, random calls solve"
    return Verdict(
        check="random",
        level=level,
        sentence=f"{verb} {told(found)}",
        early=early(len(episodes), wanted),
        rows=(found,),
        evidence=transcripts(e for e in episodes if e.success) if level is not Level.PASS else (),
    )


async def crash(stage: Stage, until: float) -> Verdict:
    """Does it bear whatever a policy may say?"""
    groups = [(stage.index(0), list(players.malformed()))]
    groups += [(stage.places[t.name], list(players.attacks(t))) for t in stage.tools[:_MOST_TOOLS]]
    parts = [(at, said[i : i + _AT_ONCE]) for at, said in groups for i in range(0, len(said), _AT_ONCE)]
    # When time runs out each tool has had some.
    random.Random(stage.seed).shuffle(parts)
    last, attacks, episodes = players.probe(stage.enders[0]) if stage.enders else "", 0, list[Episode]()
    for at, said in parts:
        if not spent(stage, until, len(episodes)):
            episodes.append(await stage.play("crash", players.once_each(said, last), at))
            attacks += len(said)
    found = row("malformed and hostile messages", episodes)
    raised = [e for e in episodes if e.fault and not e.complaints]
    broken = [e for e in episodes if e.outcome is Outcome.INFRASTRUCTURE_FAILURE]
    unjudged = [e for e in episodes if e.outcome is not None and e.reward is None and e not in broken]
    level, sentence, guilty = Level.PASS, f"{attacks} malformed and hostile messages are borne", []
    if raised:
        level, guilty = Level.FAIL, raised
        sentence = f"a message ends the actor in {len(raised)} of {len(episodes)} episodes: {raised[0].fault}"
    elif broken:
        level, guilty = Level.FAIL, broken
        sentence = (
            f"a message brings the ground down in {len(broken)} of {len(episodes)} episodes, which are then "
            f"masked instead of judged: {broken[0].note}"
        )
    elif unjudged:
        level, guilty = Level.FAIL, unjudged
        sentence = (
            f"a message leaves {len(unjudged)} of {len(episodes)} episodes without a judgement: "
            f"{unjudged[0].ending()}"
        )
    elif ignorant(found, stage) is not Level.PASS:
        level, guilty = ignorant(found, stage), [e for e in episodes if e.success]
        sentence = f"malformed and hostile messages earn success {told(found)}"
        if stage.exploited:
            sentence += ", as constants do"
    return Verdict(
        check="crash",
        level=level,
        sentence=sentence,
        early=early(len(episodes), len(parts)),
        rows=(found,),
        evidence=transcripts(guilty),
    )


async def slow(stage: Stage, until: float) -> Verdict:
    """What becomes of an episode that never comes to an end?"""
    player = players.dawdling({t.name for t in stage.enders}, "Go on." if stage.converses else "")
    policy = "the same again and again"
    episodes = await several(stage, player, policy, until)
    found, most = row(policy, episodes), stage.environment.max_turns
    late = [e for e in episodes if e.outcome is Outcome.TIMED_OUT or "no end within" in e.note + e.fault]
    unjudged = [e for e in episodes if e.outcome is not None and e.reward is None and e not in late]
    level, guilty = ignorant(found, stage), [e for e in episodes if e.success]
    sentence = f"{policy}: all end within {most} messages and are judged, {told(found)}"
    if level is not Level.PASS:
        sentence = f"{policy} earns success {told(found)}"
    elif unjudged:
        level, guilty = Level.FAIL, unjudged
        sentence = (
            f"{policy}: {len(unjudged)} of {len(episodes)} episodes that were cut have no judgement, "
            f"so that stalling escapes it: {unjudged[0].ending()}"
        )
    elif late:
        level, guilty = Level.WARN, late
        sentence = (
            f"{policy}: {len(late)} of {len(episodes)} episodes had no end within "
            f"{stage.environment.timeout_s:g} s: {late[0].note or late[0].fault}"
        )
    elif guilty := [e for e in episodes if e.fault]:
        level = Level.WARN
        sentence = f"{policy}: {len(guilty)} of {len(episodes)} episodes had no end of their own, see errors"
    return Verdict(
        check="slow",
        level=level,
        sentence=sentence,
        early=early(len(episodes), stage.wanted),
        rows=(found,),
        evidence=transcripts(guilty),
    )


def _endings(episodes: Sequence[Episode]) -> str:
    """Return how episodes ended, and what was wrong with the first."""
    if not episodes:
        return ""
    counts = Counter(str(e.outcome or "fault") for e in episodes)
    told = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
    first = next((e.fault or e.note for e in episodes if e.fault or e.note), "")
    return told + (f": {first}" if first else "")
