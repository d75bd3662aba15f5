"""Floor 2. The ledger's state as one event, and back: what lets old segments of the log go."""

from __future__ import annotations

from collections import Counter

from slipstream import course, events
from slipstream.config import RunConfig
from slipstream.leases import LeaseDesk, slot_of
from slipstream.ledger_state import Evaluation, Item, LedgerState
from slipstream.seen import Seen
from slipstream.staleness import VersionTable


def snapshot(state: LedgerState) -> events.State:
    """Return all that `restored` needs to build an equal state."""
    running = state.evaluation
    return events.State(
        epochs=dict(state.epochs),
        sessions=tuple((actor, epoch, session) for (actor, epoch), session in state.sessions.items()),
        proven=tuple((*who, tuple(sorted(pairs))) for who, pairs in state.proven.items()),
        seen=tuple(state.seen.intervals()),
        incarnation=state.incarnation,
        fork_step=state.fork_step,
        learner_session=state.learner_session,
        former_learners=tuple(sorted(state.former_learners)),
        versions=tuple(state.versions),
        forks=dict(state.versions.forks),
        updates=tuple(state.updates.values()),
        newest=state.newest.version.serial if state.newest else -1,
        next_serial=state.next_serial,
        next_group=state.next_group,
        groups=tuple((group, tuple(members)) for group, members in state.groups.items()),
        items=tuple(
            events.Kept(received=item.received, position=item.position, fate=item.fate)
            for item in state.items.values()
        ),
        first_batch=state.first_batch,
        batches=tuple(state.batches[step] for step in sorted(state.batches)),
        histories=tuple(state.histories[step] for step in sorted(state.histories)),
        training=_desk(state.training),
        heldout=_desk(state.heldout),
        evaluation=None if running is None else events.Running(
            serial=running.serial, step=running.step, results=tuple(running.results.values()),
            given_up=tuple(sorted(running.given_up)),
        ),
        evaluation_queue=tuple(state.evaluation_queue),
        evaluations=tuple(state.evaluations),
        checkpoint_step=state.checkpoint_step,
        received=state.received,
        quarantined=state.quarantined,
        tokens_received=state.tokens_received,
        forgotten=state.forgotten,
        fates=dict(state.fates),
        evaluation_fates=dict(state.evaluation_fates),
        course=course.snapshot(state.course),
    )  # fmt: skip


def restored(config: RunConfig, event: events.State) -> LedgerState:
    """Return the state that `snapshot` was taken of."""
    state = LedgerState(config)
    state.epochs = dict(event.epochs)
    state.sessions = {(actor, epoch): session for actor, epoch, session in event.sessions}
    state.proven = {(actor, session): set(pairs) for actor, session, pairs in event.proven}
    state.seen = Seen(event.seen)
    state.incarnation, state.fork_step = event.incarnation, event.fork_step
    state.learner_session, state.former_learners = event.learner_session, set(event.former_learners)
    state.versions = VersionTable(event.versions, event.forks)
    state.updates = {update.version.serial: update for update in event.updates}
    state.newest = state.updates.get(event.newest)
    state.next_serial, state.next_group = event.next_serial, event.next_group
    state.groups = {group: list(members) for group, members in event.groups}
    state.complete = {group for group, members in event.groups if None not in members}
    state.items = {
        kept.received.identity: Item(received=kept.received, position=kept.position, fate=kept.fate)
        for kept in event.items
    }
    state.first_batch = event.first_batch
    state.batches = dict(enumerate(event.batches, event.first_batch))
    state.histories = dict(enumerate(event.histories, event.first_batch))
    state.course = course.restored(
        config, event.course, groups=state.groups, batches=state.batches, look=state.look
    )
    if event.course is None:
        state.course.next_task = event.next_group
    state.training, state.heldout = _reopened(event.training), _reopened(event.heldout)
    if event.evaluation is not None:
        results = {result.attempt.task: result for result in event.evaluation.results}
        state.evaluation = Evaluation(
            serial=event.evaluation.serial, step=event.evaluation.step, results=results,
            given_up=set(event.evaluation.given_up),
        )  # fmt: skip
    state.evaluation_queue, state.evaluations = list(event.evaluation_queue), list(event.evaluations)
    state.checkpoint_step, state.received = event.checkpoint_step, event.received
    state.quarantined, state.tokens_received = event.quarantined, event.tokens_received
    state.forgotten = event.forgotten
    state.fates, state.evaluation_fates = Counter(event.fates), Counter(event.evaluation_fates)
    return state


def _desk(desk: LeaseDesk) -> events.Desk:
    return events.Desk(
        waiting=tuple(desk.waiting), leased=tuple(desk.leased.values()), issues=tuple(desk.issues.items())
    )


def _reopened(event: events.Desk) -> LeaseDesk:
    leased = {slot_of(lease): (actor, lease) for actor, lease in event.leased}
    return LeaseDesk(waiting=list(event.waiting), leased=leased, issues=dict(event.issues))
