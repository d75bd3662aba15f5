"""Floor 4. The learner's side of the protocol as a state machine: idempotent, and blind to a hub's restart.

What a hub's death may have swallowed is said again after the next Welcome, in the order it was said first:
the newest weights, the newest checkpoint, the wait for a batch, the end. The hub knows what it has heard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from slipstream.deadlines import Deadlines
from slipstream.errors import FrameError, ProtocolError
from slipstream.flight_recorder import FLIGHT
from slipstream.history import START
from slipstream.messages import (
    AnyMessage,
    Batch,
    Buffer,
    Checkpointed,
    Evaluated,
    Finish,
    Message,
    Ping,
    Publish,
    Pull,
    Refused,
    Report,
    Stop,
    Welcome,
)
from slipstream.transport.core import PeerCore
from slipstream.types import Trajectory, Version, WeightUpdate
from slipstream.wire import decode_trajectory

_KEPT_REPORTS: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PulledBatch:
    """The trajectories of one step."""

    step: int
    trajectories: tuple[Trajectory, ...]
    """Sorted by group, attempts in order."""
    counters: Mapping[str, float]
    """The hub's books when the batch was handed out."""
    versions: tuple[Version, ...] = ()
    """What every serial among the trajectories' tokens stands for."""
    forks: Mapping[int, int] = field(default_factory=dict)
    """incarnation -> the step it started from, of all since the oldest among `versions`."""
    history: str = START
    """What the learner has been trained on after this batch, as the hub has it (history.py)."""


class LearnerCore(PeerCore):
    """The learner's part of the conversation.

    Example: ``core.join(0, now=0.0); core.pull(0, 0.0); message = core.next_message(0.0)``.
    """

    def __init__(
        self, run: str, name: str, *, session: str, hub: str = "hub", limits: Deadlines | None = None
    ) -> None:
        """Prepare; nothing is sent before `join`."""
        super().__init__(role="learner", name=name, run=run, session=session, hub=hub, limits=limits)
        self.welcome: Welcome | None = None
        """The hub's answer to the first Hello."""
        self.events: deque[Evaluated | Stop | Welcome] = deque()
        """What concerns the caller; a Welcome is that of a hub that was started again."""
        self.stopped = False
        """Whether the hub has said Stop."""
        self._published: WeightUpdate | None = None
        self._checkpointed: Checkpointed | None = None
        self._pulling: int | None = None
        self._batch: PulledBatch | None = None
        self._reports: deque[Report] = deque(maxlen=_KEPT_REPORTS)
        """Rows to send once the hub has let this learner in."""
        self._finishing: Finish | None = None

    def join(self, step: int, now: float, history: str = START) -> None:
        """Say Hello as the learner that resumes from the checkpoint of `step`, trained on `history`."""
        self._step, self._history = step, history
        self._join(now)

    def publish(self, update: WeightUpdate) -> None:
        """Announce new weights."""
        self._published = update
        self._say(Publish(update=update))

    def checkpointed(self, step: int, *, oldest: int) -> None:
        """Announce a published checkpoint, and the step of the oldest that is kept."""
        self._checkpointed = Checkpointed(step=step, oldest=oldest)
        self._say(self._checkpointed)

    def report(self, about: str, metrics: Mapping[str, float | list[float]]) -> None:
        """Send one row of metrics; it waits while the hub does not know this learner."""
        row = Report(about=about, metrics=dict(metrics))
        if self.joined:
            self._say(row)
        else:
            self._reports.append(row)

    def pull(self, step: int, now: float) -> None:
        """Ask for the batch of a step, once; `take_batch` has it when it has come."""
        if self._pulling == step:
            return
        self._pulling, self._batch = step, None
        self.waits.begin("batch", f"batch {step} of the {self._hub}", self.limits.batch_s, now)
        self._say(Pull(step=step))

    def take_batch(self) -> PulledBatch | None:
        """Return the batch asked for, once, or None while it has not come."""
        batch = self._batch
        if batch is not None:
            self._pulling, self._batch = None, None
        return batch

    def finish(self, reason: str, now: float) -> None:
        """Tell the hub that training is over; it answers Stop, to this learner as to all peers."""
        self._finishing = Finish(reason=reason)
        self.waits.begin("stop", f"Stop of the {self._hub}", self.limits.drain_s, now)
        self._say(self._finishing)

    def take(self, message: AnyMessage, frames: Sequence[Buffer], now: float) -> None:
        """Take one message of the hub and the records behind it; raises RefusedError and ProtocolError."""
        self._hear()
        match message:
            case Batch():
                self._take_batch(message, frames)
            case Stop():
                self.stopped = True
                self.waits.end("stop")
                self.events.append(message)
            case Evaluated():
                self.events.append(message)
            case Welcome():
                self._take_welcome(message)
            case Refused():
                self._refused(message, now)
            case Ping():
                pass
            case _:
                raise ProtocolError(self._unexpected(message))

    def _say(self, message: Message) -> None:
        if self.joined:
            self._outbox.append((message, ()))

    def _take_batch(self, message: Batch, records: Sequence[Buffer]) -> None:
        if message.step != self._pulling or self._batch is not None:
            return
        try:
            trajectories = tuple(decode_trajectory(record) for record in records)
        except FrameError as error:
            # Whole in the hub's log, where each record was checked: damaged on its way.
            FLIGHT.note(f"batch {message.step} is asked for again: {error}")
            self._say(Pull(step=message.step))
            return
        self.waits.end("batch")
        self._batch = PulledBatch(step=message.step, trajectories=trajectories, counters=message.counters,
                                  versions=message.versions, forks=message.forks,
                                  history=message.history)  # fmt: skip

    def _take_welcome(self, message: Welcome) -> None:
        self._welcomed()
        if self.welcome is None:
            self.welcome = message
        else:
            self.events.append(message)
        if self._published is not None:
            self._say(Publish(update=self._published))
        if self._checkpointed is not None:
            self._say(self._checkpointed)
        while self._reports:
            self._say(self._reports.popleft())
        if self._pulling is not None and self._batch is None:
            self._say(Pull(step=self._pulling))
        if self._finishing is not None:
            self._say(self._finishing)
