"""Floor 5. Is the answer told before it was found?

A word that many texts hold says nothing: the answer of a task is looked for in its own text and in those of
other tasks, and only the excess counts. Whether it can be *used* is tried with rules of the kind "what stands
behind these words", which are read off the texts themselves.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from slipstream.environment_audit.answers import answers_of, holds, pattern
from slipstream.environment_audit.episode import Episode
from slipstream.environment_audit.stage import Stage
from slipstream.environment_audit.trials import early, spent, transcripts
from slipstream.environment_audit.verdicts import Level, Verdict
from slipstream.interfaces import Observation

SUSPECT: Final = 0.1
"""Excess from which on a leak is told."""
SURE: Final = 0.5
"""Share of tasks that a rule must give away, or that the first observation must tell."""
OPENINGS: Final = 4
"""So many times the wanted episodes are only opened."""
LEAST: Final = 4
"""Tasks from which on a rule means something."""
_LATER: Final = 2
"""Calls that must come after the first observation, so that the answer is not due in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A task's answers, and a text in which they should not stand."""

    answers: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """What was found in one kind of text."""

    texts: int
    own: float
    """Share of tasks whose text holds their own answer."""
    foreign: float
    """Share in which a text holds another task's different answer."""
    rule: str
    """Words behind which the answer stands, if they give it away."""
    by_rule: float
    """Share of tasks that the rule gives away."""

    @property
    def excess(self) -> float:
        """Share of tasks whose text tells more than chance does."""
        return self.own - self.foreign


def leak_of(told: Sequence[Told]) -> Leak:
    """Return how much texts tell about the answers of their tasks."""
    own = sum(holds(one.text, one.answers) for one in told)
    pairs = [
        holds(one.text, other.answers)
        for shift in (1, 2, 3)
        for one, other in zip(told, [*told[shift:], *told[:shift]], strict=True)
        if not set(map(str.casefold, one.answers)) & set(map(str.casefold, other.answers))
    ]
    rule, by_rule = _best_rule(told)
    count = max(1, len(told))
    return Leak(
        texts=len(told),
        own=own / count,
        foreign=sum(pairs) / max(1, len(pairs)),
        rule=rule,
        by_rule=by_rule / count,
    )


def _best_rule(told: Sequence[Told]) -> tuple[str, int]:
    """Return the words behind which most answers stand, and in how many texts they do at once."""
    contexts: Counter[str] = Counter()
    for one in told:
        contexts.update(set(_contexts(one)))
    best = ("", 0)
    for words, _ in contexts.most_common(24):
        hits = sum(_given_away(one, words) for one in told)
        if hits > best[1]:
            best = (words, hits)
    return best


def _contexts(one: Told) -> Iterator[str]:
    """Yield the last one, two and three words before each answer, with what stands between."""
    for answer in one.answers:
        for found in list(pattern(answer).finditer(one.text))[:4]:
            before = one.text[max(0, found.start() - 48) : found.start()]
            pieces = re.findall(r"\S+\s*|^\s+", before)
            yield from ("".join(pieces[-count:]) for count in (1, 2, 3) if count <= len(pieces))


def _given_away(one: Told, words: str) -> bool:
    """Return whether an answer is what stands behind the first of these words."""
    _, found, behind = one.text.partition(words)
    return bool(found) and any(pattern(answer).match(behind) for answer in one.answers)


async def leaks(stage: Stage, until: float) -> Verdict:
    """Does the answer stand in the opening, in a tool's description, or in the first observation?"""
    opened = await _openings(stage, until)
    known = [(episode, answers_of(episode.task, stage.secrets)) for episode in opened if episode.task]
    known = [(episode, answers) for episode, answers in known if answers]
    if len(known) < LEAST:
        sentence = (
            "tasks hold no answer that could be looked for (secrets, or data called answer, solution …)"
        )
        return Verdict(check="leaks", level=Level.PASS, sentence=sentence)
    places = {
        "the opening": [Told(answers=a, text=_opening(e.opening)) for e, a in known],
        "a tool's description": [Told(answers=a, text="\n".join(e.tools.values())) for e, a in known],
    }
    first = list(_first_observations(stage.episodes, stage.secrets))
    found = {place: leak_of(told) for place, told in places.items()}
    level, sentences = Level.PASS, []
    for place, leak in found.items():
        if leak.by_rule >= SURE and leak.excess > SUSPECT:
            level = Level.FAIL
            sentences.append(
                f"{place} gives the answer away in {leak.by_rule:.0%} of tasks, behind {leak.rule!r}"
            )
        elif leak.excess > SUSPECT:
            level = max(level, Level.WARN, key=list(Level).index)
            sentences.append(
                f"{place} holds the answer in {leak.own:.0%} of tasks ({leak.foreign:.0%} by chance), "
                "with no fixed place: fine where options are given"
            )
    if len(first) >= LEAST and (early_leak := leak_of([told for _, told in first])).excess > SUSPECT:
        sure = early_leak.excess >= SURE
        level = max(level, Level.FAIL if sure else Level.WARN, key=list(Level).index)
        sentences.append(
            f"the first observation tells the answer in {early_leak.own:.0%} of the oracle's episodes "
            f"({early_leak.foreign:.0%} by chance), though it goes on to look for it"
        )
    guilty = [e for e, a in known if holds(_opening(e.opening) + "\n".join(e.tools.values()), a)]
    guilty += [e for e, told in first if holds(told.text, told.answers)]
    sentence = f"answers of {len(known)} tasks: neither openings nor tools nor first observations tell them"
    return Verdict(
        check="leaks",
        level=level,
        sentence="; ".join(sentences) or sentence,
        early=early(len(opened), OPENINGS * stage.wanted),
        evidence=transcripts(guilty) if sentences else (),
    )


async def _openings(stage: Stage, until: float) -> list[Episode]:
    """Reset environments without playing on."""
    opened: list[Episode] = []
    for number in range(OPENINGS * stage.wanted):
        if spent(stage, until):
            break
        index = stage.index(number)
        episode = stage.blank("opened", index)
        episode.fault = await stage.opened(episode)
        opened.append(episode)
    return [episode for episode in opened if not episode.fault]


def _opening(shown: Observation | None) -> str:
    return "" if shown is None else f"{shown.system}\n{shown.user}"


def _first_observations(
    episodes: Sequence[Episode], secrets: Sequence[str]
) -> Iterator[tuple[Episode, Told]]:
    """Yield the first thing that the oracle was shown, where it called on and on after it."""
    for episode in episodes:
        calls = [move for move in episode.moves if not move.done]
        if episode.policy == "oracle" and episode.task and episode.success and len(calls) > _LATER:
            answers = answers_of(episode.task, secrets)
            if answers and not holds(calls[0].said, answers):
                yield episode, Told(answers=answers, text=calls[0].shown)
