"""Floor 3. What the hub does as soon as it can: hand a batch out, end an evaluation, give leases."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from slipstream import events
from slipstream.config import RunConfig
from slipstream.leases import LeaseDesk, assign, lease_for
from slipstream.ledger_state import LedgerState
from slipstream.receiving import summarize
from slipstream.types import Lease, Split

Given = Iterator[tuple[bytes, tuple[Lease, ...]]]
"""(peer, leases for it)."""
Give = Callable[[Mapping[bytes, int], Mapping[bytes, str]], Given]
"""(peer -> leases wanted, peer -> its actor's name) -> leases."""


class Dispatcher:
    """Turns what the state allows into events.

    Example: ``if dispatcher.hand_out(7): identities = state.batches[7]``.
    """

    def __init__(self, config: RunConfig, state: LedgerState, log: Callable[[events.AnyEvent], None]) -> None:
        """Act on a state through `log`, which appends and applies an event."""
        self._config, self._state, self._log = config, state, log

    def hand_out(self, step: int) -> bool:
        """Drop what is too old, log the next batch as trained, and return whether there is one."""
        state = self._state
        if len(state.complete) < self._config.batch.groups:
            return False
        self.filter_groups(ready=True)
        if old := [*state.members(state.overage(step)), *state.outdated(step)]:
            self._log(events.Dropped(identities=tuple(dict.fromkeys(old)), reason="dropped_by_slip"))
        identities = state.next_batch()
        if identities is None:
            return False
        self._log(events.Trained(step=step, identities=tuple(identities)))
        self.filter_groups()
        return True

    def filter_groups(self, *, ready: bool = False) -> None:
        """Drop groups that tell nothing, oldest first, as far as they may be replaced.

        A group is judged by all its episodes or not at all, and in the order of groups: when all before it
        are complete, or, with `ready`, when a batch could be made. Its length decides neither whether it is
        dropped nor which of several is, where not all may be.
        """
        state = self._state
        while state.course.alike and state.course.refills_left(state.steps, state.look) > 0:
            group = min(state.course.alike)
            waits = any(other < group for other in state.groups.keys() - state.complete)
            if waits and not (ready and len(state.complete) >= self._config.batch.groups):
                return
            self._log(events.Dropped(identities=tuple(state.members([group])), reason="filtered"))

    def measure(self, metrics: Mapping[str, float | list[float]]) -> None:
        """Log what a row of the learner says about its divergence, or that of sampling, once for each step.

        Only for the step whose batch is next: what is said later, again by a learner that came back, would
        change what the batches since have added up to.
        """
        told = (metrics.get("kl/reference"), metrics.get("kl/exploration", 0.0))
        step, state = metrics.get("step"), self._state
        known = [kl for kl in told if isinstance(kl, float) and math.isfinite(kl)]
        if not self._config.curriculum.enabled or len(known) < len(told):
            return
        kl = max(known)
        if step == state.steps and state.steps not in state.course.measured:
            self._log(events.Measured(step=state.steps, kl=kl))

    def end_evaluation(self) -> events.EvaluationDone | None:
        """Log and return the result of the evaluation under way once all its episodes are back."""
        running = self._state.evaluation
        if running is None or len(running.results) + len(running.given_up) < self._config.evaluation.tasks:
            return None
        results = [running.results[task] for task in sorted(running.results)]
        done = summarize(results, serial=running.serial, step=running.step)
        self._log(done)
        return done

    def give_up(self, slot: events.Slot) -> bool:
        """Log that an episode is owed no more, a training one with its group; return whether it is so.

        Of an evaluation at most a tenth of the tasks is left out: else its results would not compare.
        """
        state, (evaluation, group, _) = self._state, slot
        if evaluation < 0:
            held = state.members([group]) if group in state.groups else []
            self._log(events.GaveUp(slot=slot, identities=tuple(held)))
            return True
        running = state.evaluation
        left_out = len(running.given_up) if running is not None else 0
        if running is None or running.serial != evaluation:
            return False
        if 10 * (left_out + 1) > self._config.evaluation.tasks:
            return False
        self._log(events.GaveUp(slot=slot))
        return True

    def may_train(self) -> bool:
        """Return whether a training episode waits, or the gate admits another group."""
        state = self._state
        return bool(state.training.waiting) or state.room > 0

    def may_evaluate(self) -> bool:
        """Return whether a held-out episode waits."""
        return bool(self._state.heldout.waiting)

    def train(self, wants: Mapping[bytes, int], names: Mapping[bytes, str]) -> Given:
        """Open whole groups in order of their tasks, as far as wanted and allowed, and lease them out."""
        state = self._state
        while len(state.training.waiting) < sum(wants.values()) and state.room > 0:
            group = state.next_group
            made = state.course.next_opening()
            self._log(
                events.GroupOpened(
                    group=group, task=made.task, split=Split.TRAIN, stage=made.stage,
                    temperature=made.temperature, size=made.size,
                )
            )  # fmt: skip
        yield from self._lease(state.training, state.leasable(), wants, names)

    def evaluate(self, wants: Mapping[bytes, int], names: Mapping[bytes, str]) -> Given:
        """Lease out what the evaluation under way still needs."""
        heldout = self._state.heldout
        yield from self._lease(heldout, heldout.waiting, wants, names)

    def _lease(
        self,
        desk: LeaseDesk,
        waiting: Sequence[events.Slot],
        wants: Mapping[bytes, int],
        names: Mapping[bytes, str],
    ) -> Given:
        for peer, slots in assign(waiting, wants).items():
            leases = tuple(lease_for(slot, desk, self._config.seed, self._opening(slot)) for slot in slots)
            self._log(events.Leased(actor=names[peer], leases=leases))
            yield peer, leases

    def _opening(self, slot: events.Slot) -> events.Opening:
        """Return what an episode poses; a held-out one is its task."""
        return events.Opening(task=slot[1]) if slot[0] >= 0 else self._state.course.opening(slot[1])
