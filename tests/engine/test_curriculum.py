"""A curriculum's arithmetic: exact numbers."""

from __future__ import annotations

import pytest

from slipstream.config import BatchConfig, CurriculumConfig, StageConfig
from slipstream.config_curriculum import BandConfig, DynamicConfig, ExplorationConfig
from slipstream.curriculum import (
    GroupResult,
    extended,
    followed,
    group_size,
    is_alike,
    most_refills,
    notches,
    opening,
    success,
    weight,
)
from slipstream.events import Estimate, Opening, Progress

EASY, HARDER = StageConfig(advance=0.75, least_episodes=8), StageConfig(advance=0.5, least_episodes=4)
CONFIG = CurriculumConfig(enabled=True, stages=(EASY, HARDER), retreat=0.25, memory=16)


def group(successes: int, *, stage: int = 0, task: int = 0, episodes: int = 4) -> GroupResult:
    return GroupResult(task=task, stage=stage, successes=successes, episodes=episodes,
                       alike=successes in (0, episodes))  # fmt: skip


def after(progress: Progress, *groups: GroupResult, config: CurriculumConfig = CONFIG) -> Progress:
    return followed(progress, groups, None, config, notches=0, most_size=4)


def test_an_estimate_fades_and_begins_at_one_half() -> None:
    assert success(Estimate()) == 0.5
    assert success(Estimate(successes=3.0, episodes=8.0)) == 0.4
    one = extended(Estimate(successes=4.0, episodes=8.0), 8, 8, memory=16)
    assert (one.successes, one.episodes) == (10.0, 12.0)
    assert extended(one, 1, 32, memory=16) == Estimate(successes=1.0, episodes=32.0)


@pytest.mark.parametrize(
    ("successes", "expected"),
    # p = (successes + 1) / 20; below 0.2: p (1 - p) / 0.16, above 0.8 the same, never under the floor.
    [(3, 1.0), (9, 1.0), (15, 1.0), (2, 0.1275 / 0.16), (0, 0.0475 / 0.16), (17, 0.09 / 0.16), (18, 0.35)],
)
def test_tasks_outside_the_band_are_posed_as_their_success_varies(successes: int, expected: float) -> None:
    band = BandConfig(low=0.2, high=0.8, floor=0.35)
    estimate = Estimate(successes=float(successes), episodes=18.0)
    assert weight(estimate, band) == pytest.approx(max(0.35, expected), abs=1e-12)


def test_bounds_of_a_band_that_is_not_symmetric_are_its_own() -> None:
    band = BandConfig(low=0.1, high=0.6, floor=0.01)
    assert weight(Estimate(successes=7.0, episodes=8.0), band) == pytest.approx(0.8 * 0.2 / (0.6 * 0.4))
    assert weight(Estimate(successes=5.0, episodes=8.0), band) == 1.0


def test_a_stage_is_left_at_its_bound_and_not_before_its_least_episodes() -> None:
    one = after(Progress(), group(4))
    assert (one.stage, one.since, one.success) == (0, 4, Estimate(successes=4.0, episodes=4.0))
    two = after(one, group(2))
    # 4 x (1 - 4/16) + 2 = 5 of 4 x (1 - 4/16) + 4 = 7: 0.714 < 0.75.
    assert (two.stage, two.since, two.success) == (0, 8, Estimate(successes=5.0, episodes=7.0))
    three = after(two, group(4))
    assert (three.stage, three.since, three.success) == (1, 0, Estimate())


def test_episodes_of_another_stage_do_not_count_for_this_one() -> None:
    progress = Progress(stage=1)
    late = after(progress, group(4, stage=0), group(4, stage=0), group(1, stage=1))
    assert (late.stage, late.since, late.success) == (1, 4, Estimate(successes=1.0, episodes=4.0))
    assert [(stage, key) for stage, key, _ in late.tasks] == [(0, 0), (1, 0)]


def test_a_stage_that_is_too_hard_is_left_for_the_one_before() -> None:
    back = after(Progress(stage=1), group(0, stage=1))
    assert (back.stage, back.since) == (0, 0)
    # Between the bounds nothing happens: no going to and fro.
    assert after(Progress(stage=1), group(1, stage=1)).stage == 1


def test_the_last_stage_leads_to_the_real_task_and_back() -> None:
    real = after(Progress(stage=1), group(2, stage=1))
    assert real.stage == 2
    assert after(real, group(4, stage=-1), group(4, stage=-1)).stage == 2
    assert after(real, group(0, stage=-1)).stage == 1
    assert after(real, group(0, stage=1), group(0, stage=1)).stage == 2


def test_without_stages_there_is_nowhere_to_go() -> None:
    config = CurriculumConfig(enabled=True)
    progress = after(Progress(), group(0, stage=-1), config=config)
    assert (progress.stage, progress.since) == (0, 4)


def test_a_stage_beyond_those_configured_is_the_real_task() -> None:
    assert after(Progress(stage=7), group(4, stage=-1)).stage == 2


def test_the_share_of_groups_that_tell_nothing_is_averaged_over_five_batches() -> None:
    progress, shares = Progress(), []
    for told in (1, 1, 2, 2, 2, 2, 0):
        progress = after(progress, group(0 if told == 0 else 4 if told == 1 else 2), group(2))
        shares.append(progress.alike)
    halves = [0.5, 0.5, 1 / 3, 0.25, 0.2, 0.16, 0.16 + (0.5 - 0.16) / 5]
    assert shares == pytest.approx(halves)
    assert progress.batches == 7


def test_a_temperature_rises_only_inside_the_radius_and_falls_outside() -> None:
    exploration = ExplorationConfig(most_temperature=1.3, notch=0.1, alike_high=0.6, alike_low=0.3,
                                    kl_radius=0.2)  # fmt: skip
    config = CONFIG.model_copy(update={"exploration": exploration})
    assert notches(1.0, exploration) == 3
    assert notches(1.0, ExplorationConfig()) == 0

    def notch(before: int, alike: float, kl: float | None) -> int:
        progress = Progress(notch=before, alike=alike, batches=100)
        # One group in five batches' worth: the share moves to 4/5 of what it was, plus 1/5 of its own.
        own = group(0) if alike > 0.5 else group(2)
        return followed(progress, [own], kl, config, notches=3, most_size=4).notch

    assert notch(0, 0.9, 0.2) == 1
    assert notch(3, 0.9, 0.2) == 3
    assert notch(1, 0.9, 0.21) == 0
    assert notch(1, 0.9, None) == 1
    assert notch(2, 0.2, 0.0) == 1
    assert notch(0, 0.2, 0.0) == 0
    assert notch(2, 0.5, 0.0) == 2


def test_a_group_tells_nothing_when_it_ended_alike() -> None:
    by_reward = CurriculumConfig(dynamic=DynamicConfig(alike="reward"))
    by_success = CurriculumConfig(dynamic=DynamicConfig(alike="success"))
    assert not is_alike([0.9, 0.85], [True, True], by_reward)
    assert is_alike([0.9, 0.85], [True, True], by_success)
    assert is_alike([0.9, 0.9], [True, True], by_reward)
    assert not is_alike([0.9, -1.05], [True, False], by_success)


def test_groups_are_doubled_while_they_do_not_vary_and_only_by_groups_of_their_size() -> None:
    exploration = ExplorationConfig(least_group_size=3, alike_high=0.6, alike_low=0.3)
    config = CurriculumConfig(enabled=True, exploration=exploration)
    sizes = [group_size(Progress(doublings=n), 8, exploration) for n in range(4)]
    assert sizes == [3, 6, 8, 8]
    assert group_size(Progress(doublings=2), 8, ExplorationConfig()) == 8

    def then(before: Progress, *told: GroupResult) -> Progress:
        return followed(before, told, None, config, notches=0, most_size=8)

    flat, mixed = group(3, episodes=3), group(1, episodes=3)
    progress = Progress()
    for batch in range(1, 5):
        progress = then(progress, flat, flat, mixed)
        assert (progress.doublings, progress.batches) == (0, batch)
    assert progress.alike == pytest.approx(2 / 3)
    progress = then(progress, flat, flat, mixed)
    assert (progress.doublings, progress.batches) == (1, 0)
    # Of groups that were opened before nothing is learned about those that are opened now.
    later = then(progress, flat, flat, mixed)
    assert (later.doublings, later.batches, later.alike) == (1, 0, progress.alike)
    six = [group(6, episodes=6), group(2, episodes=6)]
    held = progress
    for _ in range(9):
        held = then(held, *six)
    assert (held.doublings, held.batches, held.alike) == (1, 9, pytest.approx(0.5))
    for _ in range(5):
        progress = then(progress, six[1])
    assert (progress.doublings, progress.batches) == (0, 0)
    largest = Progress(doublings=2, batches=9, alike=1.0)
    assert then(largest, group(8, episodes=8)).doublings == 2
    assert then(Progress(batches=9), mixed).doublings == 0


def posed(progress: Progress, config: CurriculumConfig, task: int = 0, seed: int = 1) -> Opening:
    return opening(progress, task=task, seed=seed, base=1.0, size=8, config=config)


def test_without_a_curriculum_each_group_poses_the_next_task_as_configured() -> None:
    warm = Progress(stage=1, notch=3)
    assert posed(warm, CurriculumConfig(stages=(EASY,)), task=17) == Opening(task=17)


def test_a_group_poses_its_stage_at_its_temperature() -> None:
    assert posed(Progress(), CONFIG) == Opening(task=0, stage=0)
    assert posed(Progress(stage=1), CONFIG, task=3) == Opening(task=3, stage=1)
    assert posed(Progress(stage=2, notch=2), CONFIG) == Opening(task=0, stage=-1, temperature=1.1)


def test_tasks_are_passed_over_as_often_as_their_band_says() -> None:
    band = BandConfig(period=4, low=0.2, high=0.8, floor=0.25)
    config = CurriculumConfig(enabled=True, band=band)
    learned, hopeless = Estimate(successes=98.0, episodes=98.0), Estimate(episodes=98.0)
    other_stage = (0, 1, learned)
    progress = Progress(tasks=((-1, 0, learned), (-1, 2, hopeless), other_stage))
    drawn, task = [], 0
    while task < 40_000:
        task = posed(progress, config, task=task).task
        drawn.append(task)
        task += 1
    assert drawn == sorted(set(drawn))
    counts = [sum(number % 4 == key for number in drawn) for key in range(4)]
    # 10,000 turns each; both others are below the floor, whose standard deviation is 43.
    assert counts[1] == counts[3] == 10_000
    assert counts[0] == pytest.approx(2500, abs=220)
    assert counts[2] == pytest.approx(2500, abs=220)
    assert drawn[:8] == [posed(progress, config, task=task).task for task in drawn[:8]]


def test_refills_are_whole_groups() -> None:
    half = CurriculumConfig(enabled=True, dynamic=DynamicConfig(refills=1.5))
    assert most_refills(half, BatchConfig(groups=3).groups) == 4
    assert most_refills(CurriculumConfig(dynamic=DynamicConfig(refills=1.5)), 3) == 0
