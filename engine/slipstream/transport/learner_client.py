"""Floor 4. The learner's side of the protocol: synchronous, idempotent, and blind to a hub's restart."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slipstream.deadlines import Deadline, Deadlines
from slipstream.errors import ProtocolError, RefusedError
from slipstream.flight_recorder import FLIGHT
from slipstream.messages import (
    PROTOCOL,
    Batch,
    Buffer,
    Checkpointed,
    Evaluated,
    Finish,
    Hello,
    Message,
    Ping,
    Publish,
    Pull,
    Refused,
    Report,
    Stop,
    Welcome,
    decode_message,
    encode_message,
)
from slipstream.transport.channel import SyncChannel
from slipstream.types import Trajectory, Version, WeightUpdate
from slipstream.wire import decode_trajectory, schema_hash


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


class LearnerClient:
    """Keeps the learner joined to the hub.

    Example: ``client.connect(0); client.publish(update); batch = client.pull(0)``.
    """

    def __init__(
        self, channel: SyncChannel, run: str, name: str, *, deadlines: Deadlines | None = None
    ) -> None:
        """Prepare; nothing is sent before `connect`."""
        self._channel, self._run, self._name = channel, run, name
        self._limits = deadlines or Deadlines()
        self._session = secrets.token_hex(8)
        self._step = 0
        self._welcome: Welcome | None = None
        self._published: WeightUpdate | None = None
        self._checkpointed: int | None = None
        self._pulling: int | None = None
        self._waiting: Deadline | None = None
        self._batch: PulledBatch | None = None
        self._events: list[Evaluated | Stop | Welcome] = []
        self._finishing: str | None = None
        self._silence = self._new_silence()
        self._next_ping = self._deadline(self._limits.ping_s, "an answer")

    def connect(self, step: int) -> Welcome:
        """Join the hub as the learner that resumes from the checkpoint of `step`.

        Raises RefusedError and DeadlineError.
        """
        self._step = step
        self._send(self._hello())
        deadline = self._deadline(self._limits.connect_s, "Welcome")
        while self._welcome is None:
            deadline.check()
            self._pump(min(self._limits.ping_s, deadline.remaining()))
        return self._welcome

    def publish(self, update: WeightUpdate) -> None:
        """Announce new weights."""
        self._published = update
        self._send(Publish(update=update))

    def pull(self, step: int, timeout_s: float | None = None) -> PulledBatch | None:
        """Return the batch of a step, or None when it is not there within `timeout_s`; then call again.

        Without a timeout it waits to the end. Raises DeadlineError `batch_s` after the first call for a step.
        """
        if self._pulling != step:
            self._pulling, self._batch = step, None
            self._waiting = self._deadline(self._limits.batch_s, f"batch {step}")
            FLIGHT.waits(f"batch {step} of the hub at {self._channel.address}", self._limits.batch_s)
            self._send(Pull(step=step))
        slice_s = self._limits.batch_s if timeout_s is None else timeout_s
        turn = self._deadline(slice_s, f"batch {step}")
        while self._batch is None:
            got = self._pump(min(self._limits.ping_s, turn.remaining()))
            if self._waiting is not None:
                self._waiting.check()
            if not got and turn.expired():
                break
        batch = self._batch
        if batch is not None:
            FLIGHT.goes_on()
            self._pulling, self._batch, self._waiting = None, None, None
        return batch

    def checkpointed(self, step: int) -> None:
        """Announce a published checkpoint."""
        self._checkpointed = step
        self._send(Checkpointed(step=step))

    def report(self, about: str, metrics: Mapping[str, float | list[float]]) -> None:
        """Send one row of metrics about "train" or "evaluation"; "step" is among its keys."""
        self._send(Report(about=about, metrics=dict(metrics)))

    def finish(self, reason: str) -> None:
        """Tell the hub that training is over; it tells every peer to stop.

        Returns when its own Stop has come: `close` drops what is on its way. Raises DeadlineError.
        """
        self._finishing = reason
        self._send(Finish(reason=reason))
        deadline = self._deadline(self._limits.drain_s, "Stop")
        while not any(isinstance(event, Stop) for event in self._events):
            deadline.check()
            self._pump(min(self._limits.ping_s, deadline.remaining()))

    def events(self, timeout_s: float = 0.0) -> list[Evaluated | Stop | Welcome]:
        """Return what else the hub said since the last call; waits up to `timeout_s` for the first of it.

        A Welcome among it is that of a hub that was started again: it may have lost what it was told.
        """
        deadline = self._deadline(timeout_s, "an event")
        while self._pump(0.0 if self._events else min(self._limits.ping_s, deadline.remaining())) or not (
            self._events or deadline.expired()
        ):
            pass
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Drop the connection."""
        self._channel.close()

    def _hello(self) -> Hello:
        return Hello(role="learner", name=self._name, run=self._run, protocol=PROTOCOL, schema=schema_hash(),
                     session=self._session, step=self._step)  # fmt: skip

    def _deadline(self, seconds: float, what: str) -> Deadline:
        return Deadline(seconds, f"learner {self._name}", f"{what} of the hub at {self._channel.address}")

    def _new_silence(self) -> Deadline:
        return self._deadline(self._limits.silence_s, "a sign of life")

    def _send(self, message: Message) -> None:
        if not self._channel.send([encode_message(message)], self._limits.send_s):
            raise self._deadline(self._limits.send_s, f"{type(message).__name__} to be taken").error()

    def _pump(self, timeout_s: float) -> bool:
        """Take one message if there is one in time; asks for a sign of life after silence."""
        frames = self._channel.receive(timeout_s)
        FLIGHT.beat()
        if frames is not None:
            self._silence = self._new_silence()
            self._next_ping = self._deadline(self._limits.ping_s, "an answer")
            self._take(frames)
            return True
        self._silence.check()
        if self._next_ping.expired():
            # A hub that was started again answers that it does not know this learner.
            self._channel.send([encode_message(Ping())], self._limits.ping_s)
            self._next_ping = self._deadline(self._limits.ping_s, "an answer")
        return False

    def _take(self, frames: Sequence[Buffer]) -> None:
        message = decode_message(frames[0])
        match message:
            case Batch():
                self._take_batch(message, frames[1:])
            case Evaluated() | Stop():
                self._events.append(message)
            case Welcome():
                self._welcomed(message)
            case Refused(retry=True):
                self._send(self._hello())
            case Refused():
                raise RefusedError(
                    f"the hub at {self._channel.address} refused the learner: {message.reason}"
                )
            case Ping():
                pass
            case _:
                raise ProtocolError(f"learner: expected a message for learners, got {type(message).__name__}")

    def _take_batch(self, message: Batch, records: Sequence[Buffer]) -> None:
        if message.step == self._pulling and self._batch is None:
            trajectories = tuple(decode_trajectory(record) for record in records)
            self._batch = PulledBatch(step=message.step, trajectories=trajectories, counters=message.counters,
                                      versions=message.versions)  # fmt: skip

    def _welcomed(self, message: Welcome) -> None:
        again, self._welcome = self._welcome is not None, message
        if not again:
            return
        self._events.append(message)
        # What a hub's death may have swallowed is said again; the hub knows what it has heard.
        if self._published is not None:
            self._send(Publish(update=self._published))
        if self._checkpointed is not None:
            self._send(Checkpointed(step=self._checkpointed))
        if self._pulling is not None and self._batch is None:
            self._send(Pull(step=self._pulling))
        if self._finishing is not None:
            self._send(Finish(reason=self._finishing))
