"""A curriculum in the hub: its decisions are in the log, go back with the learner, and prefer no length."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import invariant

sys.path.insert(0, str(Path(__file__).parent))

from ledger_rig import CONFIG, Interleavings, Rig, facts, ready

from slipstream import events, synthetic
from slipstream import messages as m
from slipstream.config import BatchConfig, CurriculumConfig, RunConfig, StageConfig
from slipstream.config_curriculum import BandConfig, DynamicConfig, ExplorationConfig
from slipstream.course import Course
from slipstream.ingest import read_events
from slipstream.ledger_snapshot import restored, snapshot
from slipstream.types import Lease

GOOD, BAD = 0.95, -1.05
CURRICULUM = CurriculumConfig(
    enabled=True,
    stages=(StageConfig(advance=0.7, least_episodes=4),),
    retreat=0.2,
    memory=8,
    band=BandConfig(period=3, low=0.3, high=0.6, floor=0.2, memory=4),
    dynamic=DynamicConfig(refills=1.0),
    exploration=ExplorationConfig(most_temperature=1.2, notch=0.1),
)
EXPLORATION = ExplorationConfig(
    most_temperature=1.2, notch=0.1, least_group_size=2, alike_high=0.2, alike_low=0.1
)


def with_curriculum(curriculum: CurriculumConfig = CURRICULUM, **changes: object) -> RunConfig:
    return CONFIG.model_copy(update={"curriculum": curriculum, **changes})


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[Callable[[RunConfig], Rig]]:
    rigs: list[Rig] = []

    def make(config: RunConfig) -> Rig:
        rigs.append(Rig(tmp_path / str(len(rigs)), config))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.ledger.check_books()
        before = facts(rig.ledger.state)
        assert facts(restored(rig.config, snapshot(rig.ledger.state))) == before
        rig.restart()
        assert facts(rig.ledger.state) == before
        rig.log.close()


def answer(rig: Rig, peer: bytes, rewards: dict[int, tuple[float, float]]) -> None:
    """Deliver both members of some groups, with these rewards, sampled under the newest weights."""
    newest = rig.ledger.state.newest
    assert newest is not None
    for group, pair in rewards.items():
        for lease in rig.leases[peer]:
            if lease.attempt.group == group and lease.evaluation < 0:
                made = rig.made(peer, lease, newest.version.serial, reward=pair[lease.attempt.attempt])
                rig.deliver(peer, made)


def publish(rig: Rig, step: int) -> None:
    rig.say(b"learner", m.Publish(update=(made := synthetic.update(
        rig.ledger.state.next_serial, step=step, incarnation=rig.ledger.state.incarnation,
        fork_step=rig.ledger.state.fork_step,
    ))))  # fmt: skip
    for peer in rig.epochs:
        rig.say(peer, m.Proof(proof=synthetic.proof(made)))


def groups_of(rig: Rig, step: int) -> list[int]:
    pulled = rig.pull(step)
    assert pulled is not None
    return sorted({t.attempt.group for t in pulled})


def report(rig: Rig, step: int, kl: float) -> None:
    row: dict[str, float | list[float]] = {"step": float(step), "kl/reference": kl}
    rig.say(b"learner", m.Report(about="train", metrics=row))


def test_without_a_curriculum_nothing_is_chosen_and_nothing_is_kept(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(CONFIG)
    peer, _ = ready(rig)
    leases = rig.want(peer, 8)
    assert {(x.stage, x.temperature) for x in leases} == {(-1, None)}
    answer(rig, peer, {0: (BAD, BAD), 1: (GOOD, GOOD)})
    report(rig, 0, 0.5)
    assert groups_of(rig, 0) == [0, 1]
    course = rig.ledger.state.course
    assert course == Course(config=CONFIG, next_task=4)
    assert not course.metrics()
    opened = [e.event for e in read_events(rig.folder) if isinstance(e.event, events.GroupOpened)]
    assert opened == [
        events.GroupOpened(group=g, task=g, split=leases[0].split, stage=-1, temperature=None)
        for g in range(4)
    ]


def test_groups_that_tell_nothing_are_replaced_up_to_the_bound(make_rig: Callable[..., Rig]) -> None:
    """Refills 1 x 2 groups: the third such group is trained."""
    rig = make_rig(with_curriculum(CurriculumConfig(enabled=True, dynamic=DynamicConfig(refills=1.0))))
    peer, _ = ready(rig)
    rig.want(peer, 100)
    assert sorted({x.attempt.group for x in rig.leases[peer]}) == [0, 1, 2, 3]
    answer(rig, peer, {1: (GOOD, GOOD)})
    # Not before its turn: which are replaced, where not all may be, is not for the quick ones to say.
    assert rig.ledger.books()["filtered"] == 0
    answer(rig, peer, {0: (BAD, BAD)})
    books = rig.ledger.books()
    assert (books["filtered"], books["buffered"]) == (4, 0)
    rig.want(peer, 100)
    # Both left `accepted`: the gate has let two more in.
    assert sorted({x.attempt.group for x in rig.leases[peer]}) == [0, 1, 2, 3, 4, 5]
    answer(rig, peer, {2: (BAD, BAD)})
    assert rig.ledger.books()["buffered"] == 2
    answer(rig, peer, {3: (GOOD, BAD)})
    assert groups_of(rig, 0) == [2, 3]
    # A batch later there are refills again.
    answer(rig, peer, {4: (BAD, BAD), 5: (BAD, GOOD)})
    assert rig.ledger.books()["filtered"] == 6
    assert rig.ledger.state.course.now.alike == pytest.approx(3 / 4)


def test_a_group_is_judged_by_all_of_it_or_not_at_all(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(with_curriculum())
    peer, announced = ready(rig)
    first, second, *_ = rig.want(peer, 4)
    rig.deliver(peer, rig.made(peer, first, announced.version.serial, reward=BAD))
    assert rig.ledger.books()["buffered"] == 1
    rig.deliver(peer, rig.made(peer, second, announced.version.serial, reward=GOOD))
    assert rig.ledger.books() | {"buffered": 2, "filtered": 0} == rig.ledger.books()


def test_a_stage_advances_with_its_batches_and_goes_back_with_the_learner(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(with_curriculum())
    peer, _ = ready(rig)
    rig.want(peer, 100)
    answer(rig, peer, {0: (GOOD, GOOD), 1: (GOOD, BAD), 2: (GOOD, BAD)})
    course = rig.ledger.state.course
    assert (course.now.stage, rig.ledger.books()["filtered"]) == (0, 2)
    assert groups_of(rig, 0) == [1, 2]
    # 2/2, then 2 x 3/4 + 1 of 4 x .. : (1.5 + 1) x 3/4 + 1 = 2.125 of (1.5 + 2) x 3/4 + 2 = 4.625: 0.46.
    assert course.now.success.episodes == pytest.approx(4.625)
    assert (course.now.stage, course.now.since) == (0, 6)
    publish(rig, 1)
    rig.want(peer, 100)
    answer(rig, peer, {3: (GOOD, GOOD), 4: (GOOD, GOOD), 5: (GOOD, GOOD), 6: (GOOD, GOOD)})
    # Two of them are filtered, two trained; all four count: 0.46 -> 0.83.
    opened = rig.ledger.state.next_group
    assert groups_of(rig, 1) == [5, 6]
    assert (course.now.stage, course.now.since) == (1, 0)
    publish(rig, 2)
    assert {x.stage for x in rig.leases[peer] if x.attempt.group < opened} == {0}
    assert {x.stage for x in rig.leases[peer] if x.attempt.group >= opened} == {-1}
    opened_before = dict(course.openings)
    before = facts(rig.ledger.state)
    rig.learner(step=1, session="resumed")
    rolled_back = rig.ledger.state
    assert (rolled_back.course.now.stage, rolled_back.course.now.since) == (0, 6)
    assert rig.ledger.books()["filtered"] == 2 + 4
    # It stays filtered, and what was opened keeps what it poses.
    assert rolled_back.course.filtered == before["course"].filtered  # type: ignore[attr-defined]
    assert rolled_back.course.openings == opened_before
    rig.publish(1)
    assert groups_of(rig, 1) == [5, 6]
    assert rolled_back.course == before["course"]
    rig.ledger.check_books()


def test_what_was_filtered_stays_so_and_counts_once_more_when_its_batch_comes_again(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(with_curriculum())
    peer, _ = ready(rig)
    rig.want(peer, 100)
    answer(rig, peer, {0: (BAD, BAD), 1: (GOOD, BAD), 2: (GOOD, BAD), 3: (BAD, BAD)})
    assert groups_of(rig, 0) == [1, 2]
    course = rig.ledger.state.course
    before = dataclasses.replace(course)
    assert (course.now.since, course.now.success.episodes) == (8, pytest.approx(5.46875))
    for life in ("second", "third"):
        rig.learner(step=0, session=life)
        assert (rig.ledger.books()["filtered"], rig.ledger.books()["trained"]) == (4, 0)
        assert course.now == events.Progress()
        assert course.refills_left(0, rig.ledger.state.look) == 0
        rig.publish(0)
        assert groups_of(rig, 0) == [1, 2]
        assert course == before
    # Once no checkpoint goes back there, it is in the base and in the counts, and nowhere else.
    rig.say(b"learner", m.Checkpointed(step=1, oldest=1))
    assert (course.filtered, course.openings, rig.ledger.books()["filtered"]) == ({}, {
        group: course.opening(group) for group in range(4, rig.ledger.state.next_group)}, 4)  # fmt: skip
    assert course.base == course.now == before.now


def test_a_stage_that_nobody_leased_is_refused(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(with_curriculum())
    peer, announced = ready(rig)
    lease, other = rig.want(peer, 2)
    assert (lease.stage, lease.attempt.task) == (0, 0)
    for alien in (
        dataclasses.replace(lease, stage=-1),
        dataclasses.replace(lease, stage=1),
        dataclasses.replace(lease, attempt=dataclasses.replace(lease.attempt, task=1)),
    ):
        rig.deliver(peer, rig.made(peer, alien, announced.version.serial))
    assert rig.ledger.books()["quarantined"] == 3
    rig.deliver(peer, rig.made(peer, lease, announced.version.serial))
    rig.deliver(peer, rig.made(peer, other, announced.version.serial))
    assert rig.ledger.books()["quarantined"] == 3


def test_the_temperature_travels_with_the_lease_and_follows_the_measured_divergence(
    make_rig: Callable[..., Rig],
) -> None:
    # Ten stages' worth of patience: only the temperature changes here.
    stages = (StageConfig(least_episodes=1000),)
    rig = make_rig(
        with_curriculum(CURRICULUM.model_copy(update={"stages": stages, "dynamic": DynamicConfig()}))
    )
    peer, _ = ready(rig)
    group = 0
    seen: list[float | None] = []
    for step, kl in enumerate((0.1, 0.1, 0.1, 0.3, 0.3, 0.1)):
        if step:
            report(rig, step, kl)
            report(rig, step, 9.0)  # said again by a learner that started again: the first word counts
        fresh = [lease for lease in rig.want(peer, 100) if lease.attempt.attempt == 0]
        seen += [lease.temperature for lease in fresh[-1:]]
        answer(rig, peer, {group: (BAD, BAD), group + 1: (BAD, BAD)})
        assert groups_of(rig, step) == [group, group + 1]
        group += 2
        publish(rig, step + 1)
    # Unknown at first; two notches up to the bound; outside the radius two down; then up again.
    assert rig.ledger.state.course.now.notch == 1
    temperatures = {x.attempt.group: x.temperature for x in rig.leases[peer]}
    assert set(temperatures.values()) == {None, 1.1, 1.2}
    measured = [e.event for e in read_events(rig.folder) if isinstance(e.event, events.Measured)]
    assert [(event.step, event.kl) for event in measured] == [
        (1, 0.1),
        (2, 0.1),
        (3, 0.3),
        (4, 0.3),
        (5, 0.1),
    ]


def grown(rig: Rig, peer: bytes, step: int, *, alike: bool) -> None:
    """Train one batch: the oldest two groups, each alike or with one good episode."""
    rig.want(peer, 100)
    newest = rig.ledger.state.newest
    assert newest is not None
    for group in sorted(rig.ledger.state.groups)[:2]:
        for lease in [x for x in rig.leases[peer] if x.attempt.group == group and x.evaluation < 0]:
            good = lease.attempt.attempt == 0 and not alike
            rig.deliver(peer, rig.made(peer, lease, newest.version.serial, reward=GOOD if good else BAD))
    assert rig.pull(step) is not None
    publish(rig, step + 1)


def test_groups_begin_small_are_doubled_while_they_do_not_vary_and_go_back_with_the_learner(
    make_rig: Callable[..., Rig],
) -> None:
    exploration = ExplorationConfig(least_group_size=2, alike_high=0.6, alike_low=0.3)
    curriculum = CurriculumConfig(enabled=True, exploration=exploration)
    rig = make_rig(with_curriculum(curriculum, batch=BatchConfig(groups=2, group_size=4)))
    peer, _ = ready(rig)
    state = rig.ledger.state
    for step in range(5):
        grown(rig, peer, step, alike=True)
        assert rig.ledger.books()["trained"] == 4 * (step + 1)
    # Five batches in which nothing varied: what is opened from here on has four episodes.
    assert (state.course.now.doublings, state.course.now.batches) == (1, 0)
    assert state.course.metrics()["curriculum/group_size"] == 4.0
    rig.want(peer, 100)
    sizes = {group: state.size_of(group) for group in sorted(state.groups)}
    # The gate, max_slip 1, lets in two batches of groups, whatever their size: one was open already.
    assert sizes == {10: 2, 11: 2, 12: 4, 13: 4}
    assert Counter(x.attempt.group for x in rig.leases[peer] if x.attempt.group > 9) == sizes
    opened = [e.event for e in read_events(rig.folder) if isinstance(e.event, events.GroupOpened)]
    assert [event.size for event in opened[-3:]] == [2, 0, 0]
    before = state.batches[3]
    grown(rig, peer, 5, alike=True)
    # Groups of two say nothing about groups of four.
    assert (state.course.now.doublings, state.course.now.batches) == (1, 0)
    for step in range(6, 11):
        grown(rig, peer, step, alike=False)
    assert rig.ledger.books()["trained"] == 6 * 4 + 5 * 8
    assert (state.course.now.doublings, state.course.now.batches) == (0, 0)
    # Back to where groups of two were trained: they return whole, and are trained again as they were.
    rig.learner(step=3, session="resumed")
    rig.ledger.check_books()
    assert (state.course.now.doublings, state.course.now.batches) == (0, 3)
    rig.publish(3)
    assert tuple(t.identity for t in rig.pull(3) or ()) == before
    assert state.course.now.batches == 4
    # The next batch's groups are too old on the new line: as many episodes of them are owed as they had.
    assert rig.pull(4) is None
    assert {group: state.groups[group] for group in (8, 9)} == {8: [None] * 2, 9: [None] * 2}
    rig.ledger.check_books()


def test_an_attempt_beyond_the_size_of_its_group_is_refused(make_rig: Callable[..., Rig]) -> None:
    exploration = ExplorationConfig(least_group_size=2)
    curriculum = CurriculumConfig(enabled=True, exploration=exploration)
    rig = make_rig(with_curriculum(curriculum, batch=BatchConfig(groups=2, group_size=4)))
    peer, announced = ready(rig)
    lease, *_ = rig.want(peer, 1)
    beyond = dataclasses.replace(lease, attempt=dataclasses.replace(lease.attempt, attempt=2))
    rig.deliver(peer, rig.made(peer, beyond, announced.version.serial))
    assert rig.ledger.books()["quarantined"] == 1


@pytest.mark.parametrize(
    "row",
    [
        {"kl/reference": 0.1},
        {"step": 1.0},
        {"step": 0.0, "kl/reference": float("nan")},
        {"step": 0.5, "kl/reference": 0.1},
        {"step": 7.0, "kl/reference": 0.1},
        {"step": 0.0, "kl/reference": 0.1, "kl/exploration": float("nan")},
    ],
)
def test_a_row_that_measures_nothing_is_no_event(make_rig: Callable[..., Rig], row: dict[str, float]) -> None:
    rig = make_rig(with_curriculum())
    ready(rig)
    rig.say(b"learner", m.Report(about="train", metrics={**row}))
    assert rig.ledger.state.course.measured == {}


@pytest.mark.parametrize(("exploration", "measured"), [(0.05, 0.1), (0.7, 0.7)])
def test_the_warmth_of_sampling_counts_in_the_radius(
    make_rig: Callable[..., Rig], exploration: float, measured: float
) -> None:
    rig = make_rig(with_curriculum())
    ready(rig)
    row: dict[str, float | list[float]] = {
        "step": 0.0,
        "kl/reference": 0.1,
        "kl/exploration": exploration,
    }
    rig.say(b"learner", m.Report(about="train", metrics=row))
    assert rig.ledger.state.course.measured == {0: measured}


def test_tasks_far_from_the_band_are_passed_over(make_rig: Callable[..., Rig]) -> None:
    """Period 3: task 3 k is always solved, 3 k + 1 never, 3 k + 2 now and then."""
    curriculum = CURRICULUM.model_copy(update={"stages": (), "dynamic": DynamicConfig()})
    rig = make_rig(with_curriculum(curriculum, steps=1000))
    peer, _ = ready(rig)
    posed: dict[int, int] = {}
    for step in range(60):
        rig.want(peer, 100)
        posed = {lease.attempt.group: lease.attempt.task for lease in rig.leases[peer]}
        pairs = {0: (GOOD, GOOD), 1: (BAD, BAD), 2: (GOOD, BAD)}
        oldest = sorted(rig.ledger.state.groups)[:2]
        answer(rig, peer, {group: pairs[posed[group] % 3] for group in oldest})
        assert rig.pull(step) is not None
        publish(rig, step + 1)
    tasks = [posed[group] for group in sorted(posed)]
    assert tasks == sorted(set(tasks))  # none is posed twice, and order is kept
    late = [task % 3 for task in tasks[12:]]
    shares = [late.count(key) / len(late) for key in range(3)]
    # Estimates of 4 episodes: p = 5/6 and 1/6 give 0.14 / 0.24 = 0.58 and 0.14 / 0.21 = 0.66 of the turns.
    expected = [0.58 / 2.24, 0.66 / 2.24, 1 / 2.24]
    assert shares == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_no_length_is_preferred_where_length_goes_with_the_outcome(
    make_rig: Callable[..., Rig], seed: int
) -> None:
    """Failures take ten times as long: what is trained and what is filtered depends on rewards alone."""
    chance = random.Random(seed)
    outcomes = {(group, attempt): chance.random() < 0.6 for group in range(400) for attempt in range(2)}

    def trained(slow: float) -> tuple[list[int], set[int]]:
        config = with_curriculum(
            CurriculumConfig(enabled=True, dynamic=DynamicConfig(refills=8.0)), steps=1000
        )
        rig = make_rig(config)
        peer, _ = ready(rig)
        now, running = 0.0, dict[Lease, float]()
        step = begun = 0
        while step < 40:
            rig.want(peer, 100)
            fresh, begun = rig.leases[peer][begun:], len(rig.leases[peer])
            for lease in fresh:
                good = outcomes[lease.attempt.group, lease.attempt.attempt]
                running[lease] = now + (1.0 if good else slow) * (1 + 0.01 * lease.attempt.attempt)
            lease = min(running, key=lambda x: (running[x], x.attempt.group, x.attempt.attempt))
            now = running.pop(lease)
            newest = rig.ledger.state.newest
            assert newest is not None
            good = outcomes[lease.attempt.group, lease.attempt.attempt]
            made = rig.made(peer, lease, newest.version.serial, reward=GOOD if good else BAD)
            rig.deliver(peer, made)
            if len(rig.ledger.state.complete) >= 2 and rig.pull(step) is not None:
                step += 1
                publish(rig, step)
        state = rig.ledger.state
        order = [state.look(i).attempt.group for n in range(step) for i in state.batches[n][::2]]
        gone = {state.look(i).attempt.group for held in state.course.filtered.values() for i in held}
        return order, gone

    def tells(group: int) -> bool:
        return outcomes[group, 0] != outcomes[group, 1]

    for slow in (1.0, 10.0):
        order, gone = trained(slow)
        assert all(map(tells, order))
        assert not any(map(tells, gone))
        # Every group up to the newest that was trained is trained or filtered, but for the stragglers that
        # the gate still waits for: (max_slip + 1) batches of them, whatever takes long.
        missing = set(range(max(order))) - set(order) - gone
        assert len(missing) <= 2 * 2
        # So the share of long episodes among what is trained is one half exactly: each has one of each.
        assert sum(outcomes[group, attempt] for group in order for attempt in range(2)) == len(order)


class Interleaved(Interleavings):
    """The same with a curriculum that filters, advances, warms, passes tasks over and doubles groups."""

    config = with_curriculum(
        CURRICULUM.model_copy(update={"exploration": EXPLORATION}),
        batch=BatchConfig(groups=2, group_size=4),
    )

    @invariant()
    def progress_is_the_fold_of_the_living_line(self) -> None:
        course, state = self.rig.ledger.state.course, self.rig.ledger.state
        again = Course(config=self.config, base=course.base, now=course.base)
        again.filtered, again.measured = dict(course.filtered), dict(course.measured)
        for step in sorted(state.batches):
            again.trained(step, state.batches[step], state.look)
        assert again.now == course.now

    @invariant()
    def what_tells_nothing_waits_for_its_turn_or_for_refills(self) -> None:
        state = self.rig.ledger.state
        waiting = state.groups.keys() - state.complete
        due = {group for group in state.course.alike if group < min(waiting, default=group + 1)}
        assert not due or not state.course.refills_left(state.steps, state.look)
        assert state.course.alike <= state.complete
        most = self.config.batch.groups * self.config.batch.group_size
        assert all(len(held) <= most for held in state.course.filtered.values())

    @invariant()
    def leases_are_what_their_group_was_opened_with(self) -> None:
        state = self.rig.ledger.state
        for (evaluation, group, _), (_, lease) in state.training.leased.items():
            opened = state.course.opening(group)
            assert evaluation < 0
            assert (lease.attempt.task, lease.stage, lease.temperature) == (
                opened.task, opened.stage, opened.temperature,
            )  # fmt: skip

    @invariant()
    def groups_have_the_size_they_were_opened_with(self) -> None:
        state = self.rig.ledger.state
        for group, members in state.groups.items():
            assert len(members) == state.size_of(group) in (2, 4)
        batches = [*state.batches.values(), *state.course.filtered.values()]
        for identities in batches:
            counts = Counter(state.look(identity).attempt.group for identity in identities)
            assert counts == {group: state.size_of(group) for group in counts}


TestInterleaved = Interleaved.TestCase
TestInterleaved.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
