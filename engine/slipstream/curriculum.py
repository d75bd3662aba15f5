"""Floor 2. In which order a policy learns: easier stages first, tasks it can learn from, warmer if need be.

A curriculum's progress is a fold over the batches of the living line: `followed(progress, groups, ...)` is
what a batch, and the groups that were filtered since the one before, make of it. So it is the same after a
replay of the log, and after a rollback it is what it was.

stages       the success p of the stage's episodes since it began, older ones fading:
             p >= advance -> the next stage, p < retreat -> the one before, never before `least_episodes`
band         task t is posed with probability w(p_t) when its turn comes: 1 inside [low, high]; outside it
             falls as the variance p (1 - p) of a success does, w = max(floor, p (1 - p) / (b (1 - b))) with
             b the nearer bound. A group-relative update can improve no more than that variance allows.
             Sources: sampling for learnability, Foster et al. 2025, arXiv:2502.12272; the bound by the
             variance, Bae et al. 2025, arXiv:2504.03380
alike        groups whose episodes ended alike have no advantage: they are replaced before they reach a
             batch. Source: dynamic sampling, DAPO, Yu et al. 2025, section 3.2, eq. 11, arXiv:2503.14476.
             There a batch is sampled until it is full; here so many groups are replaced and no more
temperature  raised by a notch while the share of such groups is high and the policy within the KL radius
             of the warm start, lowered while it is low, or the policy outside
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from slipstream.config_curriculum import BandConfig, CurriculumConfig, ExplorationConfig
from slipstream.events import Estimate, Opening, Progress

SMOOTHING: Final = 5
"""Batches over which the share of groups that tell nothing is averaged."""
REAL: Final = -1
"""The stage of the real task, as leases and trajectories name it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupResult:
    """How the episodes of one group ended."""

    task: int
    stage: int
    """As in the lease: -1 for the real task."""
    successes: int
    episodes: int
    alike: bool
    """Whether the group tells nothing."""


def is_alike(rewards: Collection[float], successes: Collection[bool], config: CurriculumConfig) -> bool:
    """Return whether a group tells nothing: all its rewards are equal, or all or none of it succeeds."""
    return len(set(rewards if config.dynamic.alike == "reward" else successes)) <= 1


def success(estimate: Estimate) -> float:
    """Return the success rate of an estimate: (successes + 1) / (episodes + 2).

    Source: Laplace's rule of succession, the mean under a uniform prior; 1/2 without an episode.
    """
    return (estimate.successes + 1.0) / (estimate.episodes + 2.0)


def extended(estimate: Estimate, successes: int, episodes: int, *, memory: int) -> Estimate:
    """Return an estimate with newer episodes in it; the older ones fade to 1 - episodes / memory of theirs.

    Example: ``extended(Estimate(successes=4, episodes=8), 8, 8, memory=16)`` has 10 successes of 12.
    """
    kept = max(0.0, 1.0 - episodes / memory)
    return Estimate(
        successes=estimate.successes * kept + successes, episodes=estimate.episodes * kept + episodes
    )


def weight(estimate: Estimate, band: BandConfig) -> float:
    """Return the probability w with which a task of this success is posed when its turn comes."""
    p = success(estimate)
    if band.low <= p <= band.high:
        return 1.0
    bound = band.low if p < band.low else band.high
    return max(band.floor, p * (1.0 - p) / (bound * (1.0 - bound)))


def followed(
    progress: Progress,
    groups: Sequence[GroupResult],
    kl: float | None,
    config: CurriculumConfig,
    *,
    notches: int,
) -> Progress:
    """Return the progress after one more batch; `groups` holds its groups and those filtered since the last.

    kl: the policy's divergence from the warm start in nats, None where nobody measured it.
    """
    share = sum(group.alike for group in groups) / max(1, len(groups))
    batches = progress.batches + 1
    alike = progress.alike + (share - progress.alike) / min(batches, SMOOTHING)
    stage, since, estimate = _staged(progress, groups, config)
    return Progress(
        stage=stage,
        since=since,
        success=estimate,
        tasks=_tasks(progress.tasks, groups, config),
        batches=batches,
        alike=alike,
        notch=_notched(progress.notch, alike, kl, config.exploration, notches),
    )


def opening(progress: Progress, *, task: int, seed: int, base: float, config: CurriculumConfig) -> Opening:
    """Return what the next group poses: the first task from `task` on whose turn it is.

    base: the configured temperature. Without a curriculum it is the task itself.
    """
    if not config.enabled:
        return Opening(task=task)
    number = REAL if progress.stage == len(config.stages) else progress.stage
    known = {key: estimate for stage, key, estimate in progress.tasks if stage == number}
    while config.band.period > 1 and not _is_due(task, known, seed, config.band):
        task += 1
    warmer = progress.notch * config.exploration.notch
    return Opening(task=task, stage=number, temperature=base + warmer if warmer else None)


def notches(base: float, exploration: ExplorationConfig) -> int:
    """Return how often the temperature can be raised from `base` without passing its bound."""
    room = (exploration.most_temperature - base) / exploration.notch
    return max(0, int(room + 1e-9)) if exploration.most_temperature else 0


def most_refills(config: CurriculumConfig, groups: int) -> int:
    """Return how many groups may be replaced for one batch of `groups`."""
    return int(config.dynamic.refills * groups) if config.enabled else 0


def _is_due(task: int, known: dict[int, Estimate], seed: int, band: BandConfig) -> bool:
    estimate = known.get(task % band.period)
    if estimate is None:
        return True
    digest = hashlib.blake2b(f"band {seed} {task}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < weight(estimate, band) * 2.0**64


def _staged(
    progress: Progress, groups: Iterable[GroupResult], config: CurriculumConfig
) -> tuple[int, int, Estimate]:
    """Return stage, its episodes, and their success; episodes of another stage do not count."""
    last = len(config.stages)
    # Stages may have been taken out of the configuration since.
    stage, since, estimate = min(progress.stage, last), progress.since, progress.success
    number = REAL if stage == last else stage
    for group in groups:
        if group.stage == number:
            since += group.episodes
            estimate = extended(estimate, group.successes, group.episodes, memory=config.memory)
    rate = estimate.successes / estimate.episodes if estimate.episodes else 0.0
    least = config.stages[min(stage, last - 1)].least_episodes if config.stages else 0
    if since >= least and stage < last and rate >= config.stages[stage].advance:
        return stage + 1, 0, Estimate()
    if since >= least and stage > 0 and rate < config.retreat:
        return stage - 1, 0, Estimate()
    return stage, since, estimate


def _tasks(
    known: tuple[tuple[int, int, Estimate], ...], groups: Iterable[GroupResult], config: CurriculumConfig
) -> tuple[tuple[int, int, Estimate], ...]:
    band = config.band
    table = {(stage, key): estimate for stage, key, estimate in known}
    for group in groups:
        key = group.stage, group.task % band.period
        before = table.get(key, Estimate())
        table[key] = extended(before, group.successes, group.episodes, memory=band.memory)
    return tuple((stage, key, table[stage, key]) for stage, key in sorted(table))


def _notched(notch: int, alike: float, kl: float | None, exploration: ExplorationConfig, most: int) -> int:
    if (kl is not None and kl > exploration.kl_radius) or alike < exploration.alike_low:
        notch -= 1
    elif kl is not None and alike > exploration.alike_high:
        notch += 1
    return min(max(notch, 0), most)
