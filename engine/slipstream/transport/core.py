"""Floor 4. What both clients of the hub have in common, without sockets, tasks or a clock of its own.

A core takes messages (`take`) and the time (`tick`), and gives messages to send (`next_message`) and events
for its caller. Whoever drives it, a socket or a simulator, hands `now` in, on one monotonic clock.

    not joined ── Hello ──▶ waiting ── Welcome ──▶ joined
                               ▲                     │
                               └── Refused(retry) ◀──┘    the hub was started again, or the connection cut

Until Welcome nothing is sent but Hello and Ping: a hub that does not know a peer drops whatever it says.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from slipstream.deadlines import Deadlines, Waits
from slipstream.errors import DamageError, RefusedError
from slipstream.flight_recorder import FLIGHT
from slipstream.history import START
from slipstream.messages import PROTOCOL, AnyMessage, Buffer, Hello, Message, Ping, Refused
from slipstream.wire import schema_hash

Outgoing = tuple[Message, Sequence[Buffer]]
"""(message, data frames behind it)."""


class PeerCore:
    """A peer's part in joining the hub, joining it again, and noticing that it is gone."""

    def __init__(
        self, *, role: str, name: str, run: str, session: str, hub: str, limits: Deadlines | None = None
    ) -> None:
        """Prepare; `hub` says in errors and in the flight recorder where the hub is."""
        self.limits = limits or Deadlines()
        self.joined = False
        self.waits = Waits(f"{role} {name}")
        self._role, self._name, self._run, self._session, self._hub = role, name, run, session, hub
        self._step, self._history = 0, START
        self._outbox: deque[Outgoing] = deque()
        self._hello_at = -math.inf
        self._heard = False
        """Whether the hub said anything since the last ping was due."""
        self._missing = 0
        """How many pings in a row found nothing heard."""
        self._ping_at = math.inf

    @property
    def who(self) -> str:
        """This peer, in words."""
        return f"{self._role} {self._name}"

    @property
    def wakes_at(self) -> float:
        """When `tick` has something to do."""
        return min(self._ping_at, self.waits.ends_at)

    def next_message(self, now: float) -> Outgoing | None:
        """Return the next message to send, or None while there is none; what is returned counts as sent."""
        return self._outbox.popleft() if self._outbox else None

    def tick(self, now: float) -> None:
        """Do what time demands; raises DeadlineError when the hub is silent or a wait has run out.

        First hand in every message that has come: a process that stood still itself has not waited.
        """
        if now >= self._ping_at:
            self._ping_at = now + self.limits.ping_s
            # Counted, not timed, for the same reason.
            self._missing = 0 if self._heard else self._missing + 1
            self._heard = False
            if self._missing * self.limits.ping_s >= self.limits.silence_s:
                self.waits.begin("silence", f"a sign of life of the {self._hub}", self.limits.silence_s,
                                 now - self.limits.silence_s)  # fmt: skip
            elif self._missing:
                self._outbox.append((Ping(), ()))
        self.waits.check(now)

    def _join(self, now: float) -> None:
        self._ping_at = now + self.limits.ping_s
        self._say_hello(now)

    def _say_hello(self, now: float) -> None:
        self._hello_at, self.joined = now, False
        self._outbox.clear()
        hello = Hello(role=self._role, name=self._name, run=self._run, protocol=PROTOCOL,
                      schema=schema_hash(), session=self._session, step=self._step,
                      history=self._history)  # fmt: skip
        self._outbox.append((hello, ()))
        self.waits.begin("welcome", f"Welcome of the {self._hub}", self.limits.connect_s, now)

    def _hear(self) -> None:
        self._heard = True
        FLIGHT.beat()

    def _refused(self, message: Refused, now: float) -> None:
        """Say Hello again to a hub that does not know this peer; raises RefusedError when it never will."""
        if not message.retry:
            raise RefusedError(f"the {self._hub} refused {self.who}: {message.reason}")
        self.joined = False
        self._join_again(now)

    def _welcomed(self) -> None:
        self.joined = True
        self.waits.end("welcome")

    def damaged(self, error: DamageError, now: float) -> None:
        """Take a message that changed on its way: after another Hello both sides say again what is open."""
        FLIGHT.note(f"joins again: {error}")
        self._hear()
        self._join_again(now)

    def remade(self, now: float) -> None:
        """Join again over a connection that was made anew: a quiet hub may not even know that one broke."""
        FLIGHT.note("joins again: the connection was made anew")
        self._say_hello(now)

    def _join_again(self, now: float) -> None:
        # What comes in numbers, refusals or damage, a single Hello answers.
        if now - self._hello_at >= self.limits.ping_s or "welcome" not in self.waits:
            self._say_hello(now)

    def _unexpected(self, message: AnyMessage) -> str:
        return f"{self.who}: expected a message for an {self._role}, got {type(message).__name__}"
