"""Floor 4. The actor's client: the state machine of actor_core.py on a channel, for asyncio."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

from slipstream.deadlines import Deadlines, within
from slipstream.errors import DamageError, ProtocolError, SlipstreamError
from slipstream.messages import Buffer, Grant, Stop, Weights, Welcome, decode_message, encode_message
from slipstream.spool import Spool
from slipstream.transport.actor_core import ActorCore
from slipstream.transport.channel import AsyncChannel
from slipstream.types import Trajectory, TrajectoryId, WeightProof

UNASSIGNED: Final = TrajectoryId(run="", actor="", epoch=-1, seq=-1)
"""Identity of a trajectory that its client has not sent yet."""
_TURN_EVERY: Final = 8
"""Trajectories after which the sender lets others of its event loop go on."""
SYNC_S: Final = 60.0
"""Longest time that an fdatasync of the spool may take."""


class ActorClient:
    """Keeps one actor joined to the hub.

    Example: ``welcome = await client.connect(); await client.want(128, 128); grant = await
    client.receive()``.
    """

    def __init__(
        self, channel: AsyncChannel, spool: Spool, run: str, name: str, *, deadlines: Deadlines | None = None
    ) -> None:
        """Prepare; nothing is sent before `connect`."""
        self._channel, self._spool = channel, spool
        channel.remade = self._remade
        self._limits = deadlines or Deadlines()
        self._hub = f"hub at {channel.address}"
        self._core = ActorCore(spool, run, name, session=secrets.token_hex(8), hub=self._hub,
                               limits=self._limits)  # fmt: skip
        self._inbox: asyncio.Queue[Grant | Weights | Stop | None] = asyncio.Queue()
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        """(what somebody waits for, what wakes it)."""
        self._failure: SlipstreamError | None = None
        self._welcome: Welcome | None = None
        self._unsent: tuple[str, list[Buffer]] | None = None
        """What the channel would not take at once, by the name of its message; all others wait behind it."""
        self._stuck = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = math.inf
        self._tasks: list[asyncio.Task[None]] = []
        self._unsynced: list[int] = []
        """Written to the spool since the last fdatasync began."""
        self._syncing: asyncio.Task[None] | None = None

    @property
    def epoch(self) -> int:
        """The epoch the hub gave this connection, or -1."""
        return self._core.epoch

    @property
    def newest_serial(self) -> int:
        """The newest serial the hub has announced, or -1."""
        return self._core.newest_serial

    async def connect(self) -> Welcome:
        """Join the hub; sends again what the spool still holds.

        Raises RefusedError (version, schema, run) and DeadlineError.
        """
        self._core.join(time.monotonic())
        self._tasks += [asyncio.create_task(self._guard(work)) for work in (self._read(), self._write())]
        self._turn()
        await self._until(lambda: self._welcome is not None)
        assert self._welcome is not None
        return self._welcome

    async def want(self, train: int, evaluate: int) -> None:
        """Say how many training and evaluation episodes could start now; replaces the last word."""
        self._core.want(train, evaluate)
        self._turn()

    async def send(self, trajectory: Trajectory) -> None:
        """Give a trajectory its identity, make it durable and send it; waits for byte credit.

        Raises DeadlineError naming the hub when credit or room in the spool does not come.
        """
        if not self._core.has_room(trajectory, time.monotonic()):
            self._turn()
            await self._until(lambda: self._core.has_room(trajectory, time.monotonic()))
        self._raise_failure()
        seq = self._core.append(trajectory)
        if self._spool.must_sync:
            await self._until_durable(seq)
        else:
            self._core.durable([seq])
            self._turn()
        if not self._core.delivered(seq):
            await self._until(lambda: self._core.delivered(seq))
        elif seq % _TURN_EVERY == 0:
            # Sending seldom waits: acknowledgements must get their turn among many.
            await asyncio.sleep(0)

    async def prove(self, proof: WeightProof) -> None:
        """Show the hub evidence that this actor holds a version; a wrong proof ends in RefusedError."""
        self._core.prove(proof)
        self._turn()

    async def report(self, counters: Mapping[str, float]) -> None:
        """Send counters for display and metrics."""
        self._core.report(counters)
        self._turn()

    async def receive(self) -> Grant | Weights | Stop:
        """Return the hub's next word; acknowledgements are handled underneath.

        Raises RefusedError, and DeadlineError when the hub gave no sign of life.
        """
        item = await self._inbox.get()
        if item is None:
            self._inbox.put_nowait(None)
            raise self._failure or ProtocolError(f"{self._core.who}: the connection is closed")
        return item

    async def drain(self, seconds: float | None = None) -> None:
        """Wait until the hub has acknowledged everything; raises DeadlineError."""
        limit = self._limits.drain_s if seconds is None else seconds
        self._raise_failure()
        if not self._core.drained(limit, time.monotonic()):
            self._turn()
            await self._until(lambda: self._core.drained(limit, time.monotonic()))

    async def close(self) -> None:
        """Drop the connection; unacknowledged trajectories stay in the spool."""
        if self._timer is not None:
            self._timer.cancel()
        if self._syncing is not None:
            # It uses the spool's files from another thread.
            await within(self._syncing, SYNC_S, self._core.who, f"the disk of {self._spool.path}")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._channel.close()
        self._spool.close()

    async def _until_durable(self, seq: int) -> None:
        """Wait until a record is safe on disk, and as far as credit goes on its way to the hub."""
        self._unsynced.append(seq)
        if self._syncing is None or self._syncing.done():
            self._syncing = asyncio.create_task(self._guard(self._sync()))
        await self._until(lambda: self._core.is_durable(seq))

    async def _sync(self) -> None:
        """Make everything written durable; episodes that end during one fdatasync share the next."""
        while self._unsynced:
            seqs, self._unsynced = self._unsynced, []
            await within(asyncio.to_thread(self._spool.sync), SYNC_S, self._core.who,
                         f"{len(seqs)} trajectories to reach the disk of {self._spool.path}")  # fmt: skip
            self._core.durable(seqs)
            self._turn()
            self._settle()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _until(self, ready: Callable[[], bool]) -> None:
        """Wait; the core knows for how long at most."""
        self._raise_failure()
        while not ready():
            changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((ready, changed))
            await changed
            self._raise_failure()

    def _settle(self) -> None:
        """Wake those whose wait is over: waking everybody would cost more than all their looks."""
        waiting, self._waiting = self._waiting, []
        for ready, changed in waiting:
            if changed.done():
                continue
            if self._failure is not None or ready():
                changed.set_result(None)
            else:
                self._waiting.append((ready, changed))

    def _turn(self) -> None:
        """Send what there is to send, hand events out, and see to it that the core wakes in time."""
        self._raise_failure()
        now = time.monotonic()
        while self._unsent is None and (outgoing := self._core.next_message(now)) is not None:
            frames = [encode_message(outgoing[0]), *outgoing[1]]
            if not self._channel.send_now(frames):
                self._unsent = type(outgoing[0]).__name__, frames
                self._stuck.set()
        self._hand_out()
        wakes_at = self._core.wakes_at
        if self._timer is None or wakes_at < self._wakes_at:
            if self._timer is not None:
                self._timer.cancel()
            self._wakes_at = wakes_at
            self._timer = asyncio.get_running_loop().call_later(max(0.0, wakes_at - now), self._wake)

    def _hand_out(self) -> None:
        events = self._core.events
        while events:
            event = events.popleft()
            if isinstance(event, Welcome):
                self._welcome = event
            else:
                self._inbox.put_nowait(event)

    def _wake(self) -> None:
        self._timer = None
        try:
            while (frames := self._channel.receive_now()) is not None:
                self._take(frames)
            self._core.tick(time.monotonic())
            self._turn()
        except SlipstreamError as error:
            self._fail(error)
        self._settle()

    def _remade(self) -> None:
        self._core.remade(time.monotonic())
        try:
            self._turn()
        except SlipstreamError as error:
            self._fail(error)

    def _fail(self, error: SlipstreamError) -> None:
        """Give the failure to everybody who waits."""
        if self._failure is None:
            self._failure = error
            self._inbox.put_nowait(None)
        self._settle()

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except SlipstreamError as error:
            self._fail(error)

    async def _read(self) -> None:
        while True:
            self._take(await self._channel.receive())
            self._turn()
            self._settle()

    def _take(self, frames: Sequence[Buffer]) -> None:
        now = time.monotonic()
        try:
            message = decode_message(frames[0])
        except DamageError as error:
            self._core.damaged(error, now)
        else:
            self._core.take(message, now)

    async def _write(self) -> None:
        """Wait for the channel, whenever it takes nothing at once."""
        while True:
            await self._stuck.wait()
            self._stuck.clear()
            if self._unsent is not None:
                name, frames = self._unsent
                await within(self._channel.send(frames), self._limits.send_s, self._core.who,
                             f"the {self._hub} to take {name}")  # fmt: skip
                self._unsent = None
                self._turn()
                self._settle()
