"""Floor 2. What the events of a run add up to: groups, batches, versions, leases and the books.

`LedgerState.apply` is the only thing that changes it, so replaying the log rebuilds it. The life of a
training trajectory:

    received ─┬─ buffered ─┬─ trained ── (learner rolled back) ── buffered
              │            └─ dropped_by_slip | filtered | given_up
              └─ duplicate | failed_infrastructure | unproven                    quarantined: bytes that
              are no trajectory

Only what may be trained (again) is remembered one by one. A batch that every checkpoint of the learner
covers is forgotten: its identities stay in `seen`, its trajectories in the counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from slipstream import events
from slipstream.config import RunConfig
from slipstream.course import Course
from slipstream.events import Slot
from slipstream.history import START, extend
from slipstream.leases import LeaseDesk
from slipstream.seen import Seen
from slipstream.staleness import VersionTable, capacity
from slipstream.types import TrajectoryId, WeightUpdate

_KEPT_STEPS: Final = 64
"""Steps that versions are remembered for, beyond what max_slip needs: spools may bring late trajectories."""
FATES: Final = (
    "trained", "buffered", "dropped_by_slip", "filtered", "given_up", "quarantined", "failed_infrastructure",
    "unproven", "duplicate",
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Item:
    """A trajectory that is buffered, or trained by a batch that may be undone."""

    received: events.Received
    position: int
    """Where the log keeps its record."""
    fate: str


@dataclass(slots=True, kw_only=True)
class Evaluation:
    """A held-out evaluation under way."""

    serial: int
    step: int
    results: dict[int, events.Received] = field(default_factory=dict)
    """task -> result."""
    given_up: set[int] = field(default_factory=set)
    """Tasks whose infrastructure fails: it ends without them."""


class LedgerState:
    """The state of a run, as its log tells it.

    Example: ``for entry in log.replay(): state.apply(entry.event, entry.position)``.
    """

    def __init__(self, config: RunConfig) -> None:
        """Start empty."""
        self._config = config
        self.epochs: dict[str, int] = {}
        self.sessions: dict[tuple[str, int], str] = {}
        self.proven: dict[tuple[str, str], set[tuple[str, int]]] = {}
        """(actor, session) -> (server, serial) pairs that it has proven; "" is its own backend."""
        self.incarnation, self.fork_step, self.learner_session = -1, 0, ""
        self.former_learners: set[str] = set()
        """Sessions of learners that another has replaced."""
        self.versions = VersionTable()
        self.updates: dict[int, WeightUpdate] = {}
        self.newest: WeightUpdate | None = None
        """Newest weights of the current incarnation."""
        self.next_serial = 0
        self.groups: dict[int, list[TrajectoryId | None]] = {}
        """Open and complete groups: an identity per attempt received."""
        self.complete: set[int] = set()
        self.next_group = 0
        self.seen = Seen()
        self.items: dict[TrajectoryId, Item] = {}
        self.first_batch = 0
        """The first batch that is remembered; no checkpoint is older."""
        self.batches: dict[int, tuple[TrajectoryId, ...]] = {}
        self.histories: dict[int, str] = {0: START}
        """batches -> what the learner must have been trained on (history.py)."""
        self.forgotten = 0
        """Trajectories of batches before `first_batch`."""
        self.course = Course(config=config)
        self.training, self.heldout = LeaseDesk(), LeaseDesk()
        self.evaluation: Evaluation | None = None
        self.evaluation_queue: list[int] = []
        self.evaluations: list[events.EvaluationDone] = []
        self.checkpoint_step = -1
        self.received = 0
        """Training trajectories in the log."""
        self.quarantined = 0
        self.tokens_received = 0
        """Sampled tokens of all training trajectories in the log, whatever became of them."""
        self.fates: Counter[str] = Counter()
        self.evaluation_fates: Counter[str] = Counter()

    def apply(self, event: events.AnyEvent, position: int = -1) -> None:
        """Take one event in."""
        match event:
            case events.Received():
                self._received(event, position)
            case events.Leased():
                for lease in event.leases:
                    (self.heldout if lease.evaluation >= 0 else self.training).lease(event.actor, lease)
            case events.Released():
                for slot in event.slots:
                    (self.heldout if slot[0] >= 0 else self.training).release(slot)
            case events.GroupOpened():
                self._opened(event)
            case events.Trained():
                self._leave_buffer(event.identities, "trained")
                self.batches[event.step] = event.identities
                self.course.trained(event.step, event.identities, self.look)
                self.histories[event.step + 1] = extend(self.histories[event.step], event.identities)
            case events.Dropped(reason="filtered"):
                self._leave_buffer(event.identities, event.reason)
                self.course.drop(self.steps, event.identities)
            case events.Dropped():
                self._draw_again(event.identities, event.reason)
            case events.GaveUp():
                self._gave_up(event)
            case events.Quarantined():
                self.quarantined += 1
            case _:
                self._apply_peer(event)

    def _apply_peer(self, event: events.AnyEvent) -> None:
        match event:
            case events.Epoch():
                self._joined(event)
            case events.Proven():
                self.proven.setdefault((event.actor, event.session), set()).add((event.server, event.serial))
            case events.Incarnation():
                if self.incarnation >= 0:
                    self.former_learners.add(self.learner_session)
                self.incarnation, self.fork_step = event.number, event.fork_step
                self.learner_session, self.newest = event.session, None
                self.versions.fork(event.number, event.fork_step)
            case events.Published():
                self._published(event.update)
            case events.RolledBack():
                self._rolled_back(event.step)
            case events.Measured():
                self.course.measure(event)
            case events.EvaluationDone():
                self.evaluations.append(event)
                self.evaluation = None
                self._next_evaluation()
            case events.CheckpointPublished():
                self.checkpoint_step = event.step
                self._forget(event.oldest)

    @property
    def version(self) -> int:
        """Step of the newest weights; before an incarnation's first, the step it started from."""
        return self.newest.version.step if self.newest else self.fork_step

    @property
    def accepted(self) -> int:
        """Trajectories trained or waiting to be."""
        return self.fates["trained"] + self.fates["buffered"]

    @property
    def room(self) -> int:
        """Groups the staleness gate would still let in."""
        return self._ahead - len(self.groups)

    def leasable(self) -> list[Slot]:
        """Return the waiting episodes of groups that the gate admits, oldest first.

        After a rollback more groups are open than the gate would let in: the later ones wait, or they
        would be too old when their turn comes.
        """
        beyond = sorted(self.groups)[max(0, self._ahead) :]
        return [slot for slot in self.training.waiting if not beyond or slot[1] < beyond[0]]

    @property
    def _ahead(self) -> int:
        """Groups that may be open or complete, by the staleness gate."""
        config = self._config
        return capacity(
            self.steps * config.batch.groups, 0, self.version, config.max_slip, config.batch.groups
        )

    @property
    def steps(self) -> int:
        """Batches handed out in the living line."""
        return self.first_batch + len(self.batches)

    @property
    def is_over(self) -> bool:
        """Whether the last step is trained, evaluated and in a checkpoint."""
        steps = self._config.steps
        return self.checkpoint_step >= steps and any(done.step >= steps for done in self.evaluations)

    @property
    def evaluation_serials(self) -> list[int]:
        """Return the serials to be evaluated, the one under way first."""
        return [*([self.evaluation.serial] if self.evaluation else []), *self.evaluation_queue]

    @property
    def oldest_position(self) -> int | None:
        """Where the log keeps the oldest record that may be asked for, if there is one."""
        return min((item.position for item in self.items.values()), default=None)

    def next_batch(self) -> list[TrajectoryId] | None:
        """Return the next batch, groups and attempts ascending, or None while it is not whole."""
        ready = sorted(self.complete)[: self._config.batch.groups]
        if len(ready) < self._config.batch.groups:
            return None
        return self.members(ready)

    def look(self, identity: TrajectoryId) -> events.Received:
        """Return what is known of a trajectory that may still be trained, or trained again."""
        return self.items[identity].received

    def size_of(self, group: int) -> int:
        """Return how many episodes a group has that may still be trained, or trained again."""
        return self.course.opening(group).size or self._config.batch.group_size

    def members(self, groups: Iterable[int]) -> list[TrajectoryId]:
        """Return the identities received for some groups, in order."""
        return [identity for group in groups for identity in self.groups[group] if identity is not None]

    def overage(self, step: int) -> list[int]:
        """Return the complete groups of which every token would be older than max_slip at a step."""
        return [group for group in sorted(self.complete) if self._are_old(self.members([group]), step)]

    def outdated(self, step: int) -> list[TrajectoryId]:
        """Return the members of complete groups that were sampled on a branch given up, too old at a step.

        A group is kept for its other members. No token of these would be trained; sampled once more, on the
        living branch, they are young.
        """
        return [
            identity
            for identity in self.members(sorted(self.complete))
            if all(self.versions.is_given_up(self.incarnation, n) for n in self.look(identity).serials)
            and self._are_old([identity], step)
        ]

    def is_proven(
        self, received_by: TrajectoryId, serials: Iterable[int], samplers: Iterable[tuple[str, int]] = ()
    ) -> bool:
        """Return whether the session that made a trajectory has proven every serial, where it was sampled."""
        session = self.sessions.get((received_by.actor, received_by.epoch))
        if session is None:
            return False
        pairs = set(samplers) or {("", serial) for serial in serials}
        named = {serial for _, serial in pairs}
        return named >= set(serials) and pairs <= self.proven.get((received_by.actor, session), set())

    def is_replaced(self, role: str, name: str, session: str) -> bool:
        """Return whether another process has taken this one's place: it may never come back."""
        if role == "learner":
            return session in self.former_learners
        newest = self.epochs.get(name, -1)
        return self.sessions.get((name, newest)) != session and any(
            self.sessions.get((name, epoch)) == session for epoch in range(newest)
        )

    def evaluation_of(self, update: WeightUpdate) -> events.EvaluationDone | None:
        """Return a result for these very weights, if there is one."""
        return next((done for done in self.evaluations if self._are_weights(done.serial, update)), None)

    def _are_weights(self, serial: int, update: WeightUpdate) -> bool:
        """Return whether a serial stands for the weights of an update."""
        known = self.versions[serial]
        return (known.step, known.checksum64) == (update.version.step, update.version.checksum64)

    def books(self) -> dict[str, int]:
        """Return the books: made = the sum of all FATES, evaluation apart; and what is leased."""
        books = {fate: self.fates[fate] for fate in FATES} | {"quarantined": self.quarantined}
        evaluation = {f"evaluation_{fate}": count for fate, count in sorted(self.evaluation_fates.items())}
        return {
            "made": self.received + self.quarantined,
            **books,
            "leased": len(self.training.leased),
            "waiting": len(self.training.waiting),
            "evaluation_leased": len(self.heldout.leased),
            **evaluation,
        }

    def _unfilled(self, group: int) -> list[TrajectoryId | None]:
        return [None] * self.size_of(group)

    def _are_old(self, identities: Iterable[TrajectoryId], step: int) -> bool:
        """Return whether some trajectories have tokens, and all are older than max_slip at a step."""
        serials = sorted({serial for identity in identities for serial in self.look(identity).serials})
        if not serials:
            return False
        return int(self.versions.slip_at(step, self.incarnation, serials).min()) > self._config.max_slip

    def _received(self, event: events.Received, position: int) -> None:
        self.seen.add(event.identity)
        if event.evaluation >= 0:
            desk, fates = self.heldout, self.evaluation_fates
        else:
            desk, fates = self.training, self.fates
            self.received += 1
            self.tokens_received += event.tokens
        fates[event.verdict] += 1
        if event.verdict in ("failed_infrastructure", "unproven"):
            desk.release(event.slot, event.issue)
        elif event.verdict == "evaluated" and self.evaluation is not None:
            self.evaluation.results[event.attempt.task] = event
            desk.settle(event.slot)
        elif event.verdict == "buffered":
            self.items[event.identity] = Item(received=event, position=position, fate="buffered")
            members = self.groups[event.attempt.group]
            members[event.attempt.attempt] = event.identity
            desk.settle(event.slot)
            self._complete(event.attempt.group)

    def _opened(self, event: events.GroupOpened) -> None:
        self.next_group = event.group + 1
        self.course.opened(event)
        self.groups[event.group] = self._unfilled(event.group)
        self.training.owe((-1, event.group, attempt) for attempt in range(self.size_of(event.group)))

    def _leave_buffer(self, identities: Iterable[TrajectoryId], fate: str) -> None:
        for identity in identities:
            item = self.items[identity]
            self.fates[item.fate] -= 1
            self.fates[fate] += 1
            item.fate = fate
            group = item.received.attempt.group
            self.groups.pop(group, None)
            self.complete.discard(group)
            self.course.alike.discard(group)

    def _complete(self, group: int) -> None:
        """Note a group as complete once all its members are in the buffer."""
        members = [identity for identity in self.groups[group] if identity is not None]
        if len(members) == len(self.groups[group]):
            self.complete.add(group)
            self.course.completed(group, [self.look(identity) for identity in members])

    def _return(self, identities: Iterable[TrajectoryId]) -> None:
        """Take trajectories back into the buffer."""
        for identity in identities:
            item = self.items[identity]
            attempt = item.received.attempt
            self.fates[item.fate] -= 1
            self.fates["buffered"] += 1
            item.fate = "buffered"
            group = self.groups.setdefault(attempt.group, self._unfilled(attempt.group))
            group[attempt.attempt] = identity
            self._complete(attempt.group)

    def _gave_up(self, event: events.GaveUp) -> None:
        evaluation, group, _ = event.slot
        if evaluation >= 0:
            self.heldout.settle(event.slot)
            if self.evaluation is not None:
                self.evaluation.given_up.add(group)
            return
        self._leave_buffer(event.identities, "given_up")
        for identity in event.identities:
            del self.items[identity]
        self.groups.pop(group, None)
        size = self.size_of(group)
        self.course.openings.pop(group, None)
        for attempt in range(size):
            if (-1, group, attempt) in self.training:
                self.training.settle((-1, group, attempt))

    def _draw_again(self, identities: Iterable[TrajectoryId], fate: str) -> None:
        """Owe the attempts of some trajectories again; their groups keep the others."""
        for identity in identities:
            item = self.items.pop(identity)
            received, group = item.received, item.received.attempt.group
            self.fates[item.fate] -= 1
            self.fates[fate] += 1
            self.groups[group][received.attempt.attempt] = None
            self.complete.discard(group)
            self.course.alike.discard(group)
            self.training.issues[received.slot] = received.issue + 1
            self.training.owe([received.slot])

    def _joined(self, event: events.Epoch) -> None:
        before = self.sessions.get((event.actor, self.epochs.get(event.actor, -1)))
        self.epochs[event.actor] = event.epoch
        self.sessions[event.actor, event.epoch] = event.session
        if before != event.session:
            for desk in (self.training, self.heldout):
                for slot in desk.slots_of(event.actor):
                    desk.release(slot)

    def _published(self, update: WeightUpdate) -> None:
        self.versions.add(update.version)
        self.updates[update.version.serial] = update
        self.newest = update
        self.next_serial = max(self.next_serial, update.version.serial + 1)
        step = update.version.step
        due = step % self._config.evaluation.every == 0 or step == self._config.steps
        # A learner that starts from a checkpoint publishes its weights once more.
        known = (*(done.serial for done in self.evaluations), *self.evaluation_serials)
        if due and not any(self._are_weights(serial, update) for serial in known):
            self.evaluation_queue.append(update.version.serial)
            self._next_evaluation()

    def _next_evaluation(self) -> None:
        if self.evaluation is None and self.evaluation_queue:
            serial = self.evaluation_queue.pop(0)
            self.evaluation = Evaluation(serial=serial, step=self.versions[serial].step)
            self.heldout.owe((serial, task, 0) for task in range(self._config.evaluation.tasks))

    def _rolled_back(self, step: int) -> None:
        for undone in sorted(number for number in self.batches if number >= step):
            del self.histories[undone + 1]
            self._return(self.batches.pop(undone))
        self.course.roll_back(step, self.batches, self.look)
        self.evaluation_queue = [s for s in self.evaluation_queue if self.versions[s].step <= step]
        if self.evaluation is not None and self.evaluation.step > step:
            self.evaluation = None
            self.heldout.clear()
            self._next_evaluation()

    def _forget(self, oldest: int) -> None:
        """Forget the batches before `oldest`, and versions that no token to come can name."""
        for step in range(self.first_batch, min(oldest, self.steps)):
            batch = self.batches.pop(step)
            for identity in (*self.course.forget(step, batch, self.look), *batch):
                del self.items[identity]
            self.forgotten += len(batch)
            del self.histories[step]
            self.first_batch = step + 1
        horizon = min(self.version, self.first_batch) - self._config.max_slip - _KEPT_STEPS
        named = {serial for item in self.items.values() for serial in item.received.serials}
        evaluated = {done.serial for done in self.evaluations}
        pinned = set(self.evaluation_serials)
        recent = {version.serial for version in self.versions if version.step >= horizon}
        self.versions.keep(named | evaluated | pinned | recent)
        self.updates = {serial: self.updates[serial] for serial in self.updates if serial in pinned | recent}
        known = named | pinned | recent
        proven = {key: {pair for pair in pairs if pair[1] in known} for key, pairs in self.proven.items()}
        self.proven = {key: pairs for key, pairs in proven.items() if pairs}
