"""Floor 2. Which episodes are owed, and which of them somebody runs."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from slipstream.events import Opening, Slot
from slipstream.types import Lease, Split, TaskAttempt


@dataclass(slots=True, kw_only=True)
class LeaseDesk:
    """Owed episodes: waiting for an actor, or leased to one.

    Example: ``desk.owe([(-1, 0, 0)]); desk.lease("a", lease); desk.release((-1, 0, 0)); desk.settle((-1,
    0, 0))``.
    """

    waiting: list[Slot] = field(default_factory=list)
    """Ascending: the oldest group goes first, also when it is leased again."""
    leased: dict[Slot, tuple[str, Lease]] = field(default_factory=dict)
    """slot -> (actor, lease)."""
    issues: dict[Slot, int] = field(default_factory=dict)
    """slot -> issue of its next lease, where that is not 0."""

    def __len__(self) -> int:
        """Return how many episodes are owed."""
        return len(self.waiting) + len(self.leased)

    def __contains__(self, slot: object) -> bool:
        """Return whether an episode is owed."""
        return slot in self.leased or slot in self.waiting

    def owe(self, slots: Iterable[Slot]) -> None:
        """Add episodes."""
        for slot in slots:
            bisect.insort(self.waiting, slot)

    def lease(self, actor: str, lease: Lease) -> None:
        """Give a waiting episode to an actor."""
        slot = slot_of(lease)
        self.waiting.remove(slot)
        self.leased[slot] = (actor, lease)

    def release(self, slot: Slot, issue: int | None = None) -> None:
        """End a lease without a result; with `issue`, only if that issue of it is still the running one."""
        held = self.leased.get(slot)
        if held is None or issue not in (None, held[1].issue):
            return
        del self.leased[slot]
        self.issues[slot] = held[1].issue + 1
        bisect.insort(self.waiting, slot)

    def settle(self, slot: Slot) -> None:
        """Forget an episode that has its result."""
        self.issues.pop(slot, None)
        if self.leased.pop(slot, None) is None:
            self.waiting.remove(slot)

    def clear(self) -> None:
        """Forget everything."""
        self.waiting.clear()
        self.leased.clear()
        self.issues.clear()

    def slots_of(self, actor: str) -> list[Slot]:
        """Return the episodes an actor runs."""
        return [slot for slot, (holder, _) in self.leased.items() if holder == actor]


def slot_of(lease: Lease) -> Slot:
    """Return the episode a lease is for."""
    return lease.evaluation, lease.attempt.group, lease.attempt.attempt


def lease_for(slot: Slot, desk: LeaseDesk, seed: int, opening: Opening) -> Lease:
    """Return the lease of a waiting episode, whose group poses what `opening` says."""
    evaluation, group, attempt = slot
    return Lease(
        attempt=TaskAttempt(task=opening.task, seed=seed, group=group, attempt=attempt),
        split=Split.HELDOUT if evaluation >= 0 else Split.TRAIN,
        evaluation=evaluation,
        issue=desk.issues.get(slot, 0),
        stage=opening.stage,
        temperature=opening.temperature,
    )


def assign(waiting: Sequence[Slot], wants: Mapping[bytes, int]) -> dict[bytes, list[Slot]]:
    """Share waiting episodes out, oldest first, each to whoever has most free places."""
    free, plan = dict(wants), dict[bytes, list[Slot]]()
    for slot in waiting[: sum(wants.values())]:
        peer = max(free, key=lambda name: free[name])
        free[peer] -= 1
        plan.setdefault(peer, []).append(slot)
    return plan
