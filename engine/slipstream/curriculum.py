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
size         of groups: doubled while the share of such groups is high, halved while it is low. While success
             is near 1/2 a few episodes of a task differ already; the rest is better spent on the next step
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
    most_size: int,
) -> Progress:
    """Return the progress after one more batch; `groups` holds its groups and those filtered since the last.

    kl: the policy's divergence from the warm start in nats, None where nobody measured it.
    """
    batches, alike = _share_alike(progress, groups, group_size(progress, most_size, config.exploration))
    doublings = _doubled(progress.doublings, batches, alike, config.exploration, most_size)
    stage, since, estimate = _staged(progress, groups, config)
    return Progress(
        stage=stage,
        since=since,
        success=estimate,
        tasks=_tasks(progress.tasks, groups, config),
        # The share of groups of another size begins anew.
        batches=batches if doublings == progress.doublings else 0,
        alike=alike,
        notch=_notched(progress.notch, alike, kl, config.exploration, notches),
        doublings=doublings,
    )


def opening(
    progress: Progress, *, task: int, seed: int, base: float, size: int, config: CurriculumConfig
) -> Opening:
    """Return what the next group poses: the first task from `task` on whose turn it is.

    base, size: the configured temperature, and episodes of a group. Without a curriculum it poses the task
    itself.
    """
    if not config.enabled:
        return Opening(task=task)
    number = REAL if progress.stage == len(config.stages) else progress.stage
    known = {key: estimate for stage, key, estimate in progress.tasks if stage == number}
    while config.band.period > 1 and not _is_due(task, known, seed, config.band):
        task += 1
    warmer = progress.notch * config.exploration.notch
    chosen = group_size(progress, size, config.exploration)
    return Opening(
        task=task,
        stage=number,
        temperature=base + warmer if warmer else None,
        size=chosen if chosen < size else 0,
    )


def group_size(progress: Progress, most: int, exploration: ExplorationConfig) -> int:
    """Return how many episodes the next group has: least_group_size x 2^doublings, never above `most`."""
    least = exploration.least_group_size
    return min(most, least << progress.doublings) if least else most


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


def _share_alike(progress: Progress, groups: Sequence[GroupResult], size: int) -> tuple[int, float]:
    """Return the batches that had groups of the size, and the share of these that told nothing."""
    told = [group.alike for group in groups if group.episodes == size]
    if not told:
        return progress.batches, progress.alike
    batches = progress.batches + 1
    share = sum(told) / len(told)
    return batches, progress.alike + (share - progress.alike) / min(batches, SMOOTHING)


def _doubled(doublings: int, batches: int, alike: float, exploration: ExplorationConfig, most: int) -> int:
    if not exploration.least_group_size or batches < SMOOTHING:
        return doublings
    if alike > exploration.alike_high and exploration.least_group_size << doublings < most:
        return doublings + 1
    return max(0, doublings - 1) if alike < exploration.alike_low else doublings


def _notched(notch: int, alike: float, kl: float | None, exploration: ExplorationConfig, most: int) -> int:
    if (kl is not None and kl > exploration.kl_radius) or alike < exploration.alike_low:
        notch -= 1
    elif kl is not None and alike > exploration.alike_high:
        notch += 1
    return min(max(notch, 0), most)
