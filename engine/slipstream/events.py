"""Floor 1. The events of a run: all that must survive the hub. Its state is what they add up to."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from slipstream.messages import Buffer, decode_struct
from slipstream.types import Lease, Outcome, Split, TaskAttempt, TrajectoryId, Version, WeightUpdate

Slot = tuple[int, int, int]
"""(evaluation serial or -1, group, attempt): one episode that is owed."""


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", forbid_unknown_fields=True):
    """Base of all events; `kind` in the log is the class's name."""


class Epoch(Event, frozen=True, kw_only=True, tag=True):
    """An actor joined, for the first time or again."""

    actor: str
    epoch: int
    session: str


class Incarnation(Event, frozen=True, kw_only=True, tag=True):
    """A learner joined."""

    number: int
    fork_step: int
    session: str


class GroupOpened(Event, frozen=True, kw_only=True, tag=True):
    """The gate let one more group in."""

    group: int
    task: int
    split: Split
    stage: int = -1
    """The curriculum's stage, or -1 for the real task."""
    temperature: float | None = None
    """What the curriculum has it sampled at; None: as configured."""
    size: int = 0
    """How many episodes the curriculum gives it; 0: as configured."""


class Leased(Event, frozen=True, kw_only=True, tag=True):
    """An actor was given episodes to run."""

    actor: str
    leases: tuple[Lease, ...]


class Released(Event, frozen=True, kw_only=True, tag=True):
    """Leases ended without a trajectory: time-out, lost or replaced actor."""

    slots: tuple[Slot, ...]
    reason: str


class Received(Event, frozen=True, kw_only=True, tag=True):
    """A trajectory arrived; its record follows the event in the log."""

    identity: TrajectoryId
    attempt: TaskAttempt
    split: Split
    evaluation: int
    issue: int
    outcome: Outcome
    success: bool
    reward: float
    turns: int
    tokens: int
    """Sampled tokens."""
    serials: tuple[int, ...]
    """Distinct serials of its sampled tokens, ascending."""
    verdict: Literal["buffered", "evaluated", "duplicate", "failed_infrastructure", "unproven"]
    """What became of it on arrival. One that a monitor screened is buffered as any other and fills its batch;
    that it weighs nothing there is the learner's to count (`screened` in metrics.jsonl)."""
    stage: int = -1
    beside: dict[str, float] = {}
    """Of an evaluation: what its scores tell beside the reward, as `rewards.shown` names it."""

    @property
    def slot(self) -> Slot:
        """The episode it answers."""
        return self.evaluation, self.attempt.group, self.attempt.attempt


class Quarantined(Event, frozen=True, kw_only=True, tag=True):
    """Bytes arrived that are no valid trajectory; they are kept in `file`."""

    actor: str
    file: str
    reason: str


class Trained(Event, frozen=True, kw_only=True, tag=True):
    """A batch was handed to the learner."""

    step: int
    identities: tuple[TrajectoryId, ...]


class Dropped(Event, frozen=True, kw_only=True, tag=True):
    """Complete groups left the buffer unused."""

    identities: tuple[TrajectoryId, ...]
    reason: Literal["dropped_by_slip", "filtered"]


class GaveUp(Event, frozen=True, kw_only=True, tag=True):
    """The infrastructure of an episode failed too often while others succeeded: it is owed no more.

    A training episode takes its group with it, a held-out one is left out of its evaluation.
    """

    slot: Slot
    identities: tuple[TrajectoryId, ...] = ()
    """What the group had in the buffer."""


class Published(Event, frozen=True, kw_only=True, tag=True):
    """The learner published weights."""

    update: WeightUpdate


class Proven(Event, frozen=True, kw_only=True, tag=True):
    """An actor's session proved that it, or the server that it samples from, holds a serial."""

    actor: str
    session: str
    serial: int
    server: str = ""


class RolledBack(Event, frozen=True, kw_only=True, tag=True):
    """A learner resumed from `step`: batches from there on return to the buffer."""

    step: int


class Measured(Event, frozen=True, kw_only=True, tag=True):
    """The learner told how far its policy is from the warm start."""

    step: int
    """Optimizer steps done."""
    kl: float
    """kl/reference of the last of them, or kl/exploration if that is larger; in nats."""


class EvaluationDone(Event, frozen=True, kw_only=True, tag=True):
    """A held-out evaluation is complete."""

    serial: int
    step: int
    success: float
    count: int
    metrics: dict[str, float]
    solved: tuple[tuple[int, bool], ...] = ()
    """Each task, and whether it was solved."""


class CheckpointPublished(Event, frozen=True, kw_only=True, tag=True):
    """The learner published a checkpoint."""

    step: int
    oldest: int = 0
    """Step of the oldest checkpoint it keeps: it never goes back further."""


class Opening(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a curriculum chose for a group."""

    task: int
    stage: int = -1
    temperature: float | None = None
    size: int = 0


class Estimate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A success rate, as a curriculum remembers it: older episodes fade."""

    successes: float = 0.0
    episodes: float = 0.0


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far a curriculum has come: what the batches handed out add up to (curriculum.py)."""

    stage: int = 0
    """Counted from 0; the number of stages stands for the real task."""
    since: int = 0
    """Its episodes since it began."""
    success: Estimate = Estimate()
    """Of the same episodes."""
    tasks: tuple[tuple[int, int, Estimate], ...] = ()
    """(stage, task modulo the period, its success), ascending."""
    batches: int = 0
    """With groups of the size they are opened with now."""
    alike: float = 0.0
    """Share of such groups that tell nothing, averaged over the last of these batches."""
    notch: int = 0
    """How often the temperature has been raised."""
    doublings: int = 0
    """How often the size of groups has been doubled."""


class Course(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a curriculum stands, and what it needs to go back to an earlier batch (course.py)."""

    base: Progress = Progress()
    """After the batches that are forgotten."""
    next_task: int = 0
    openings: tuple[tuple[int, Opening], ...] = ()
    """Of groups that are not task g of the real task, as configured."""
    filtered: tuple[tuple[int, tuple[TrajectoryId, ...]], ...] = ()
    """(batch, trajectories of groups that told nothing while it was the next one)."""
    measured: tuple[tuple[int, float], ...] = ()
    """(step, kl)."""


class Kept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A trajectory that may still be trained, or trained again."""

    received: Received
    position: int
    """Where the log keeps its record."""
    fate: str


class Desk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Episodes that are owed."""

    waiting: tuple[Slot, ...]
    leased: tuple[tuple[str, Lease], ...]
    """(actor, lease)."""
    issues: tuple[tuple[Slot, int], ...]


class Running(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A held-out evaluation under way."""

    serial: int
    step: int
    results: tuple[Received, ...]
    given_up: tuple[int, ...] = ()
    """Tasks that are left out."""


class State(Event, frozen=True, kw_only=True, tag=True):
    """What all events before add up to; opens every segment of the log but the first.

    Nothing older has to be read, so that the segments before may be removed.
    """

    epochs: dict[str, int]
    sessions: tuple[tuple[str, int, str], ...]
    """(actor, epoch, session)."""
    proven: tuple[tuple[str, str, tuple[tuple[str, int], ...]], ...]
    """(actor, session, (server, serial) pairs)."""
    seen: tuple[tuple[str, int, tuple[tuple[int, int], ...]], ...]
    """(actor, epoch, intervals of sequence numbers): the watermarks against duplicates, with their gaps."""
    incarnation: int
    fork_step: int
    learner_session: str
    former_learners: tuple[str, ...]
    """Sessions that may never come back."""
    versions: tuple[Version, ...]
    forks: dict[int, int]
    """incarnation -> the step it started from."""
    updates: tuple[WeightUpdate, ...]
    newest: int
    """Serial of the newest weights, or -1."""
    next_serial: int
    next_group: int
    groups: tuple[tuple[int, tuple[TrajectoryId | None, ...]], ...]
    items: tuple[Kept, ...]
    first_batch: int
    batches: tuple[tuple[TrajectoryId, ...], ...]
    """From `first_batch` on."""
    histories: tuple[str, ...]
    """After `first_batch` batches, and after each of `batches`."""
    training: Desk
    heldout: Desk
    evaluation: Running | None
    evaluation_queue: tuple[int, ...]
    evaluations: tuple[EvaluationDone, ...]
    checkpoint_step: int
    received: int
    quarantined: int
    tokens_received: int
    forgotten: int
    """Trained trajectories that no checkpoint can ask for again."""
    fates: dict[str, int]
    evaluation_fates: dict[str, int]
    course: Course | None = None
    """None in a log that is older than the curriculum."""


AnyEvent = (
    Epoch
    | Incarnation
    | GroupOpened
    | Leased
    | Released
    | Received
    | Quarantined
    | Trained
    | Dropped
    | GaveUp
    | Published
    | Proven
    | RolledBack
    | Measured
    | EvaluationDone
    | CheckpointPublished
    | State
)


_DECODER: Final = msgspec.msgpack.Decoder(AnyEvent)
_MOST_BYTES: Final = 1 << 26
_MOST_ITEMS: Final = 1 << 24
"""A batch names each of its trajectories."""


def decode_event(body: Buffer) -> AnyEvent:
    """Return the event in a record of the log; raises FrameError for anything else."""
    event: AnyEvent = decode_struct(body, _DECODER, what="event", limit=_MOST_BYTES, most_items=_MOST_ITEMS)
    return event


def brief(event: AnyEvent) -> str:
    """Return an event in a few words for a time line, or "" for those that come by the thousand."""
    match event:
        case Received() | Leased() | GroupOpened() | Measured() | State():
            return ""
        case Epoch(actor=actor, epoch=epoch):
            return f"actor {actor} joined, epoch {epoch}"
        case Incarnation(number=number, fork_step=step):
            return f"learner joined at step {step}, incarnation {number}"
        case Released(slots=slots, reason=reason):
            return f"{len(slots)} leases released: {reason}"
        case Quarantined(actor=actor, file=file, reason=reason):
            return f"bytes of {actor} quarantined as {file}: {reason}"
        case GaveUp(slot=(evaluation, group, _)):
            where = f"the evaluation of serial {evaluation}" if evaluation >= 0 else "training"
            return f"task {group} given up in {where}: its infrastructure fails while others' works"
        case Trained(step=step, identities=identities):
            return f"batch {step} handed out, {len(identities)} trajectories"
        case Dropped(identities=identities, reason=reason):
            return f"{len(identities)} trajectories dropped: {reason}"
        case Published(update=update):
            return f"serial {update.version.serial} of step {update.version.step} announced"
        case Proven(actor=actor, serial=serial, server=server):
            return f"serial {serial} proven by {server or actor}"
        case RolledBack(step=step):
            return f"learner went back to step {step}"
        case EvaluationDone(serial=serial, success=success):
            return f"serial {serial} evaluated, success {success:.3f}"
        case CheckpointPublished(step=step):
            return f"checkpoint of step {step}"
