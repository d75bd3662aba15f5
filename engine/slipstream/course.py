"""Floor 2. Where a run's curriculum stands along its line of batches, and how it goes back.

GroupOpened  ─▶ openings: what a group poses stays what it was, whatever the curriculum does later
Received     ─▶ alike: complete groups that tell nothing
Dropped      ─▶ filtered: theirs, under the number of batches before; kept until no checkpoint needs them
Measured     ─▶ measured: the divergence after a step
Trained      ─▶ progress: one step of the fold (curriculum.followed)
RolledBack   ─▶ progress: the fold again, up to there; what was filtered since returns to the buffer
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from slipstream import curriculum, events
from slipstream.config import RunConfig
from slipstream.types import TrajectoryId

Look = Callable[[TrajectoryId], events.Received]
"""Tells what is known of a trajectory."""
_NOT_YET: Final = events.Progress()


@dataclass(slots=True, kw_only=True)
class Course:
    """The part of the ledger's state that belongs to the curriculum.

    Example: ``course.opened(event); opening = course.opening(event.group)``.
    """

    config: RunConfig = field(compare=False, repr=False)
    base: events.Progress = _NOT_YET
    """After the batches that are forgotten."""
    now: events.Progress = _NOT_YET
    """After all batches."""
    next_task: int = 0
    openings: dict[int, events.Opening] = field(default_factory=dict)
    """Of groups that are not task g of the real task, as configured."""
    alike: set[int] = field(default_factory=set)
    """Complete groups that tell nothing."""
    filtered: dict[int, tuple[TrajectoryId, ...]] = field(default_factory=dict)
    """batch -> trajectories of groups that were filtered while it was the next one."""
    measured: dict[int, float] = field(default_factory=dict)
    """step -> kl."""

    def opened(self, event: events.GroupOpened) -> None:
        """Note what a group poses."""
        self.next_task = event.task + 1
        made = events.Opening(task=event.task, stage=event.stage, temperature=event.temperature,
                              size=event.size)  # fmt: skip
        if made != events.Opening(task=event.group):
            self.openings[event.group] = made

    def opening(self, group: int) -> events.Opening:
        """Return what a group poses."""
        return self.openings.get(group) or events.Opening(task=group)

    def next_opening(self) -> events.Opening:
        """Return what the next group is to pose."""
        return curriculum.opening(
            self.now,
            task=self.next_task,
            seed=self.config.seed,
            base=self.config.sampling.temperature,
            size=self.config.batch.group_size,
            config=self.config.curriculum,
        )

    def completed(self, group: int, members: Sequence[events.Received]) -> None:
        """Take in a group of which all members are in the buffer."""
        if self.config.curriculum.enabled and self._is_alike(members):
            self.alike.add(group)

    def refills_left(self, step: int, look: Look) -> int:
        """Return how many groups may still be replaced for a batch."""
        most = curriculum.most_refills(self.config.curriculum, self.config.batch.groups)
        return most - len({look(identity).attempt.group for identity in self.filtered.get(step, ())})

    def drop(self, step: int, identities: Sequence[TrajectoryId]) -> None:
        """Note what was filtered while batch `step` was the next one."""
        self.filtered[step] = (*self.filtered.get(step, ()), *identities)

    def measure(self, event: events.Measured) -> None:
        """Note a divergence."""
        self.measured.setdefault(event.step, event.kl)

    def trained(self, step: int, batch: Sequence[TrajectoryId], look: Look) -> None:
        """Take the batch in that is handed out at a step."""
        self.now = self._followed(self.now, step, batch, look)

    def roll_back(self, step: int, batches: Mapping[int, Sequence[TrajectoryId]], look: Look) -> None:
        """Go back to the first `step` batches, of which `batches` holds those that are not forgotten."""
        self.now = self.base
        for number in sorted(batches):
            self.now = self._followed(self.now, number, batches[number], look)
        self.measured = {at: kl for at, kl in self.measured.items() if at <= step}

    def forget(self, step: int, batch: Sequence[TrajectoryId], look: Look) -> tuple[TrajectoryId, ...]:
        """Take batch `step` into the base; return what was filtered before it, to be forgotten too."""
        self.base = self._followed(self.base, step, batch, look)
        gone = self.filtered.pop(step, ())
        for group in {look(identity).attempt.group for identity in (*batch, *gone)}:
            self.openings.pop(group, None)
        self.measured.pop(step, None)
        return gone

    def metrics(self) -> dict[str, float]:
        """Return what a row of metrics says of the curriculum; nothing without one."""
        config = self.config.curriculum
        if not config.enabled:
            return {}
        warmer = self.now.notch * config.exploration.notch
        return {
            "curriculum/stage": float(self.now.stage),
            "curriculum/success": curriculum.success(self.now.success),
            "curriculum/alike": self.now.alike,
            "curriculum/temperature": self.config.sampling.temperature + warmer,
            "curriculum/group_size": float(
                curriculum.group_size(self.now, self.config.batch.group_size, config.exploration)
            ),
        }

    def _is_alike(self, members: Sequence[events.Received]) -> bool:
        rewards, successes = [x.reward for x in members], [x.success for x in members]
        return curriculum.is_alike(rewards, successes, self.config.curriculum)

    def _followed(
        self, progress: events.Progress, step: int, batch: Sequence[TrajectoryId], look: Look
    ) -> events.Progress:
        config = self.config.curriculum
        if not config.enabled:
            return progress
        return curriculum.followed(
            progress,
            self._results(map(look, (*self.filtered.get(step, ()), *batch))),
            self.measured.get(step),
            config,
            notches=curriculum.notches(self.config.sampling.temperature, config.exploration),
            most_size=self.config.batch.group_size,
        )

    def _results(self, received: Iterable[events.Received]) -> list[curriculum.GroupResult]:
        groups: dict[int, list[events.Received]] = {}
        for event in received:
            groups.setdefault(event.attempt.group, []).append(event)
        return [
            curriculum.GroupResult(
                task=members[0].attempt.task,
                stage=members[0].stage,
                successes=sum(member.success for member in members),
                episodes=len(members),
                alike=self._is_alike(members),
            )
            # In the order of groups, not of their arrival: equal batches make equal progress.
            for _, members in sorted(groups.items())
        ]


def snapshot(course: Course) -> events.Course:
    """Return all that `restored` needs, beside groups and batches."""
    return events.Course(
        base=course.base,
        next_task=course.next_task,
        openings=tuple(sorted(course.openings.items())),
        filtered=tuple(sorted(course.filtered.items())),
        measured=tuple(sorted(course.measured.items())),
    )


def restored(
    config: RunConfig,
    event: events.Course | None,
    *,
    groups: Mapping[int, Sequence[TrajectoryId | None]],
    batches: Mapping[int, Sequence[TrajectoryId]],
    look: Look,
) -> Course:
    """Return the course that `snapshot` was taken of, beside these groups and batches."""
    if event is None:
        return Course(config=config)
    course = Course(
        config=config,
        base=event.base,
        now=event.base,
        next_task=event.next_task,
        openings=dict(event.openings),
        filtered=dict(event.filtered),
        measured=dict(event.measured),
    )
    for step in sorted(batches):
        course.trained(step, batches[step], look)
    for group, members in groups.items():
        known = [look(member) for member in members if member is not None]
        if len(known) == len(members):
            course.completed(group, known)
    return course
