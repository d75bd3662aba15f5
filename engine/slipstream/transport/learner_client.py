"""Floor 4. The learner's client: the state machine of learner_core.py on a channel, synchronous."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence

from slipstream.deadlines import Deadline, Deadlines
from slipstream.errors import DamageError
from slipstream.history import START
from slipstream.messages import Buffer, Evaluated, Stop, Welcome, decode_message, encode_message
from slipstream.transport.channel import SyncChannel
from slipstream.transport.learner_core import LearnerCore, PulledBatch
from slipstream.types import WeightUpdate


class LearnerClient:
    """Keeps the learner joined to the hub.

    Example: ``client.connect(0); client.publish(update); batch = client.pull(0)``.
    """

    def __init__(
        self, channel: SyncChannel, run: str, name: str, *, deadlines: Deadlines | None = None
    ) -> None:
        """Prepare; nothing is sent before `connect`."""
        self._channel = channel
        channel.remade = lambda: self._core.remade(time.monotonic())
        self._limits = deadlines or Deadlines()
        self._hub = f"hub at {channel.address}"
        self._core = LearnerCore(run, name, session=secrets.token_hex(8), hub=self._hub, limits=self._limits)

    def connect(self, step: int, history: str = START) -> Welcome:
        """Join the hub as the learner that resumes from the checkpoint of `step`, trained on `history`.

        Raises RefusedError and DeadlineError.
        """
        self._core.join(step, time.monotonic(), history)
        self._flush()
        while self._core.welcome is None:
            self._pump(self._limits.ping_s)
        return self._core.welcome

    def publish(self, update: WeightUpdate) -> None:
        """Announce new weights."""
        self._core.publish(update)
        self._flush()

    def pull(self, step: int, timeout_s: float | None = None) -> PulledBatch | None:
        """Return the batch of a step, or None when it is not there within `timeout_s`; then call again.

        Without a timeout it waits to the end. Raises DeadlineError `batch_s` after the first call for a step.
        """
        self._core.pull(step, time.monotonic())
        self._flush()
        turn = Deadline(timeout_s or 0.0, self._core.who, f"batch {step}")
        while (batch := self._core.take_batch()) is None:
            if timeout_s is None:
                self._pump(self._limits.ping_s)
            elif not self._pump(min(self._limits.ping_s, turn.remaining())) and turn.expired():
                return self._core.take_batch()
        return batch

    def checkpointed(self, step: int, *, oldest: int) -> None:
        """Announce a published checkpoint, and the step of the oldest that is kept."""
        self._core.checkpointed(step, oldest=oldest)
        self._flush()

    def report(self, about: str, metrics: Mapping[str, float | list[float]]) -> None:
        """Send one row of metrics about "train" or "evaluation"; "step" is among its keys."""
        self._core.report(about, metrics)
        self._flush()

    def finish(self, reason: str) -> None:
        """Tell the hub that training is over; it tells every peer to stop.

        Returns when its own Stop has come: `close` drops what is on its way. Raises DeadlineError.
        """
        self._core.finish(reason, time.monotonic())
        self._flush()
        while not self._core.stopped:
            self._pump(self._limits.ping_s)

    def events(self, timeout_s: float = 0.0) -> list[Evaluated | Stop | Welcome]:
        """Return what else the hub said since the last call; waits up to `timeout_s` for the first of it.

        A Welcome among it is that of a hub that was started again: it may have lost what it was told.
        """
        turn, events = Deadline(timeout_s, self._core.who, "an event"), self._core.events
        while self._pump(0.0 if events else min(self._limits.ping_s, turn.remaining())) or not (
            events or turn.expired()
        ):
            pass
        heard = list(events)
        events.clear()
        return heard

    def close(self) -> None:
        """Drop the connection."""
        self._channel.close()

    def _flush(self) -> None:
        while (outgoing := self._core.next_message(time.monotonic())) is not None:
            if not self._channel.send([encode_message(outgoing[0]), *outgoing[1]], self._limits.send_s):
                taken = f"the {self._hub} to take {type(outgoing[0]).__name__}"
                raise Deadline(self._limits.send_s, self._core.who, taken).error()

    def _pump(self, timeout_s: float) -> bool:
        """Take one message if there is one in time, and do what time demands if there is none."""
        until_due = max(0.0, self._core.wakes_at - time.monotonic())
        frames = self._channel.receive(min(timeout_s, until_due))
        now = time.monotonic()
        if frames is not None:
            self._take(frames, now)
        else:
            self._core.tick(now)
        self._flush()
        return frames is not None

    def _take(self, frames: Sequence[Buffer], now: float) -> None:
        try:
            message = decode_message(frames[0])
        except DamageError as error:
            self._core.damaged(error, now)
        else:
            self._core.take(message, frames[1:], now)
