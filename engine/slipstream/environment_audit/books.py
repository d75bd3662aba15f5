"""Floor 5. What all episodes of an audit together say: rewards, observations, errors, speed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from slipstream.config import RewardConfig
from slipstream.config_tasks import DOMINANCE_MARGIN, OUTCOME_GAP
from slipstream.environment_audit.episode import Episode
from slipstream.environment_audit.players import scripted
from slipstream.environment_audit.stage import Stage
from slipstream.environment_audit.trials import several, transcripts
from slipstream.environment_audit.verdicts import Level, Verdict
from slipstream.environments.factory import ORACLE
from slipstream.types import Outcome, Score, ScoreKind

UNJUDGED: Final = 0.05
"""Share of finished episodes without a judgement from which on that is told."""
MOST_CHARS: Final = 1 << 20
"""An observation beyond it fills memory before anything cuts it."""
SLOW_S: Final = 1.0
"""A reset or a step that takes longer at its 95th percentile keeps actors waiting."""
_TINY: Final = 1e-9


async def rewards(stage: Stage, until: float) -> Verdict:
    """Are rewards finite, within their caps, and does every success beat every failure?"""
    judged = [e for e in stage.episodes if e.outcome not in (None, Outcome.INFRASTRUCTURE_FAILURE)]
    faults = [(e, fault) for e in judged for fault in _score_faults(e, stage.rewards)]
    won = [e for e in judged if e.success and e.reward is not None]
    lost = [e for e in judged if not e.success and e.reward is not None]
    known = [e.reward for e in (*won, *lost) if e.reward is not None]
    level, sentence, guilty = Level.PASS, f"{len(judged)} episodes, no reward", []
    if known:
        sentence = f"{len(judged)} episodes, rewards from {min(known):+.2f} to {max(known):+.2f}"
    unjudged = [e for e in judged if e.reward is None and e.policy != "crash"]
    if faults:
        level, guilty = Level.FAIL, [faults[0][0]]
        sentence = f"{faults[0][1]} ({len({id(e) for e, _ in faults})} of {len(judged)} episodes)"
    elif won and lost:
        worst = min(won, key=lambda e: e.reward or 0.0)
        best = max(lost, key=lambda e: e.reward or 0.0)
        gap = (worst.reward or 0.0) - (best.reward or 0.0)
        sentence += f"; the worst success beats the best failure by {gap:.2f}"
        if gap < DOMINANCE_MARGIN:
            level, guilty = Level.FAIL, [worst, best]
            sentence = (
                f"the best failure ({best.reward:+.2f}, {best.policy}) is not beaten by the worst success "
                f"({worst.reward:+.2f}, {worst.policy}): expected {DOMINANCE_MARGIN:g} between them"
            )
    else:
        sentence += f"; no {'success' if lost else 'failure'} to compare with"
    if level is Level.PASS and len(unjudged) > UNJUDGED * len(judged):
        level, guilty = Level.WARN, unjudged
        sentence += f"; {len(unjudged)} of {len(judged)} could not be judged"
    return Verdict(check="rewards", level=level, sentence=sentence, evidence=transcripts(guilty))


def _score_faults(episode: Episode, config: RewardConfig) -> Iterator[str]:
    scores = episode.scores
    if not any(score.kind is ScoreKind.OUTCOME for score in scores):
        yield "an episode has no outcome score, so that it never succeeds and is never trained"
    for score in scores:
        if score.value is None:
            if not score.invalid:
                yield f"score {score.name} is missing and gives no reason"
        elif not math.isfinite(score.weight * score.value):
            yield f"score {score.name} is {score.weight:g} x {score.value:g}"
    earned = _sum(scores, ScoreKind.OUTCOME)
    if abs(earned) > OUTCOME_GAP / 2 + _TINY:
        yield f"outcomes sum to {earned:+g}, expected -1 to +1"
    shaping = _sum(scores, ScoreKind.SHAPING)
    if shaping > config.shaping + _TINY:
        yield f"shaping earns {shaping:+g}, beyond rewards.shaping = {config.shaping:g}, and is cut there"
    if _sum(scores, ScoreKind.PENALTY) > _TINY:
        yield f"penalties sum to {_sum(scores, ScoreKind.PENALTY):+g}: they may only take away"
    for turn, move in enumerate(episode.moves, start=1):
        if not math.isfinite(move.reward):
            yield f"message {turn} earns {move.reward}"


def _sum(scores: Sequence[Score], kind: ScoreKind) -> float:
    found = (s.weight * s.value for s in scores if s.kind is kind and s.value is not None)
    return sum(value for value in found if math.isfinite(value))


async def observations(stage: Stage, until: float) -> Verdict:
    """Is what the policy sees text, of a bounded size, and are its tools the same throughout?"""
    broken = [(e, sentence) for e in stage.episodes for _, sentence in e.complaints]
    largest = max(stage.episodes, key=_largest, default=None)
    size = 0 if largest is None else _largest(largest)
    usual = stage.environment.limits.observation_chars
    level, guilty = Level.PASS, list[Episode]()
    moved = [e for e in stage.episodes if e.other_tools]
    sentence = f"text throughout, at most {size:,} characters; tools stay as they are"
    if broken:
        level, guilty = Level.FAIL, [broken[0][0]]
        sentence = f"{broken[0][1]} ({broken[0][0].name})"
    elif largest is not None and size > usual:
        level, guilty = Level.FAIL if size > MOST_CHARS else Level.WARN, [largest]
        sentence = (
            f"an observation has {size:,} characters ({largest.name}); cut it, as a sandbox does at "
            f"{usual:,}: longer than environment.max_tokens it ends the episode"
        )
    elif moved:
        level, guilty = Level.WARN, moved
        sentence = (
            f"tools come or go in mid-run in {len(moved)} of {len(stage.episodes)} episodes: see that the "
            "policy is told"
        )
    return Verdict(check="observations", level=level, sentence=sentence, evidence=transcripts(guilty))


def _largest(episode: Episode) -> int:
    return max((move.size for move in episode.moves), default=0)


async def errors(stage: Stage, until: float) -> Verdict:
    """Does anything raise what would end an actor, or fail as its ground would?"""
    usual = [e for e in stage.episodes if e.policy != "crash"]
    raised = [e for e in usual if e.fault and not e.complaints]
    failed = [e for e in usual if e.outcome is Outcome.INFRASTRUCTURE_FAILURE]
    level, guilty, sentence = Level.PASS, raised or failed, f"none in {len(usual)} episodes"
    if raised:
        level = Level.FAIL
        sentence = (
            f"{len(raised)} of {len(usual)} episodes end their actor: {raised[0].fault} ({raised[0].name})"
        )
    elif failed:
        level = Level.WARN
        sentence = f"the ground failed in {len(failed)} of {len(usual)} episodes: {failed[0].note}"
    return Verdict(check="errors", level=level, sentence=sentence, evidence=transcripts(guilty))


async def speed(stage: Stage, until: float) -> Verdict:
    """How many episodes does one process play in a second, without a policy's time?"""
    script, began = stage.factory().scripts.get(ORACLE), time.perf_counter()
    episodes = []
    if script is not None:
        episodes = await several(stage, scripted(script), "oracle, timed", until, count=4 * stage.wanted)
    per_s = len(episodes) / (time.perf_counter() - began)
    resets = [e.reset_s for e in stage.episodes if e.opening is not None]
    steps = [move.seconds for e in stage.episodes if e.policy != "crash" for move in e.moves]
    reset_s, step_s = (float(np.percentile(s, 95)) if s else 0.0 for s in (resets, steps))
    played = f"{per_s:,.0f} episodes/s of the oracle in one process" if episodes else "no oracle to time"
    level = Level.WARN if max(reset_s, step_s) > SLOW_S else Level.PASS
    sentence = f"{played}; 95 % of resets take at most {1e3 * reset_s:.2g} ms, of steps {1e3 * step_s:.2g} ms"
    return Verdict(check="speed", level=level, sentence=sentence)
