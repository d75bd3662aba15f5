"""Floor 4. The actor's side of the protocol: spool, credit, leases, and reconnection without loss."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

from slipstream.deadlines import Deadline, Deadlines, within
from slipstream.errors import ProtocolError, RefusedError, SlipstreamError
from slipstream.flight_recorder import FLIGHT
from slipstream.messages import (
    PROTOCOL,
    Ack,
    AnyMessage,
    Buffer,
    Deliver,
    Grant,
    Hello,
    Message,
    Ping,
    Proof,
    Refused,
    Status,
    Stop,
    Want,
    Weights,
    Welcome,
    decode_message,
    encode_message,
)
from slipstream.spool import Spool
from slipstream.transport.channel import AsyncChannel
from slipstream.types import Lease, Trajectory, TrajectoryId, WeightProof
from slipstream.wire import encode_trajectory, most_bytes, schema_hash

UNASSIGNED: Final = TrajectoryId(run="", actor="", epoch=-1, seq=-1)
"""Identity of a trajectory that its client has not sent yet."""
_KEPT_PROOFS: Final = 16


class ActorClient:
    """Keeps one actor joined to the hub.

    Example: ``welcome = await client.connect(); await client.want(128, 128); grant = await
    client.receive()``.
    """

    def __init__(
        self, channel: AsyncChannel, spool: Spool, run: str, name: str, *, deadlines: Deadlines | None = None
    ) -> None:
        """Prepare; nothing is sent before `connect`."""
        self._channel, self._spool, self._run, self._name = channel, spool, run, name
        self._limits = deadlines or Deadlines()
        self._session = secrets.token_hex(8)
        self._epoch, self._credit = -1, 0
        self._on_the_way: dict[int, int] = {}
        self._bytes_on_the_way = 0
        self._held: set[Lease] = set()
        self._sent_leases: dict[int, Lease] = {}
        self._received = [0, 0]
        self._wanted: tuple[int, int] | None = None
        self._proofs: deque[WeightProof] = deque(maxlen=_KEPT_PROOFS)
        self._newest_serial = -1
        self._inbox: asyncio.Queue[Grant | Weights | Stop | None] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._failure: SlipstreamError | None = None
        self._welcome: asyncio.Future[Welcome] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._heard = 0
        """Messages of the hub so far."""

    @property
    def epoch(self) -> int:
        """The epoch the hub gave this connection, or -1."""
        return self._epoch

    @property
    def newest_serial(self) -> int:
        """The newest serial the hub has announced, or -1."""
        return self._newest_serial

    async def connect(self) -> Welcome:
        """Join the hub; sends again what the spool still holds.

        Raises RefusedError (version, schema, run) and DeadlineError.
        """
        self._welcome = asyncio.get_running_loop().create_future()
        await self._send(self._hello())
        self._tasks += [asyncio.create_task(self._guard(work)) for work in (self._read(), self._watch())]
        return await within(
            asyncio.shield(self._welcome), self._limits.connect_s, self._who, f"Welcome of the {self._hub}"
        )

    async def want(self, train: int, evaluate: int) -> None:
        """Say how many training and evaluation episodes could start now; replaces the last word."""
        self._wanted = (train, evaluate)
        await self._send(Want(train=train, evaluate=evaluate, received_train=self._received[0],
                              received_evaluate=self._received[1]))  # fmt: skip

    async def send(self, trajectory: Trajectory) -> None:
        """Give a trajectory its identity, make it durable and send it; waits for byte credit.

        Raises DeadlineError naming the hub when credit or room in the spool does not come.
        """
        most = most_bytes(trajectory)
        if not self._spool.has_room(most):
            await self._wait(lambda: self._spool.has_room(most), self._limits.credit_s, "room in the spool")
        seq = self._spool.next_seq
        identity = TrajectoryId(run=self._run, actor=self._name, epoch=self._epoch, seq=seq)
        record = encode_trajectory(trajectory, identity)
        self._spool.append(seq, record)
        self._sent_leases[seq] = Lease(attempt=trajectory.attempt, split=trajectory.split,
                                       evaluation=trajectory.evaluation, issue=trajectory.issue)  # fmt: skip
        await self._deliver(seq, record)
        # Sending seldom waits: acknowledgements must get their turn between two of many.
        await asyncio.sleep(0)

    async def prove(self, proof: WeightProof) -> None:
        """Show the hub evidence that this actor holds a version; a wrong proof ends in RefusedError."""
        self._proofs.append(proof)
        await self._send(Proof(proof=proof))

    async def report(self, counters: Mapping[str, float]) -> None:
        """Send counters for display and metrics."""
        await self._send(Status(counters={key: float(value) for key, value in counters.items()}))

    async def receive(self) -> Grant | Weights | Stop:
        """Return the hub's next word; acknowledgements are handled underneath.

        Raises RefusedError, and DeadlineError when the hub gave no sign of life.
        """
        item = await self._inbox.get()
        if item is None:
            self._inbox.put_nowait(None)
            raise self._failure or ProtocolError(f"{self._who}: the connection is closed")
        return item

    async def drain(self, seconds: float | None = None) -> None:
        """Wait until the hub has acknowledged everything; raises DeadlineError."""
        limit = self._limits.drain_s if seconds is None else seconds
        await self._wait(lambda: len(self._spool) == 0, limit, "the last acknowledgements")

    async def close(self) -> None:
        """Drop the connection; unacknowledged trajectories stay in the spool."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._channel.close()
        self._spool.close()

    @property
    def _who(self) -> str:
        return f"actor {self._name}"

    @property
    def _hub(self) -> str:
        return f"hub at {self._channel.address}"

    def _hello(self) -> Hello:
        return Hello(role="actor", name=self._name, run=self._run, protocol=PROTOCOL, schema=schema_hash(),
                     session=self._session)  # fmt: skip

    async def _send(self, message: Message, frames: Sequence[Buffer] = ()) -> None:
        if self._failure is not None:
            raise self._failure
        everything = [encode_message(message), *frames]
        if not self._channel.send_now(everything):
            await within(self._channel.send(everything), self._limits.send_s, self._who,
                         f"the {self._hub} to take {type(message).__name__}")  # fmt: skip

    async def _deliver(self, seq: int, record: Buffer) -> None:
        size = len(record)
        if self._failure is not None or not self._has_credit(size):
            await self._wait(lambda: self._has_credit(size) or seq not in self._spool,
                             self._limits.credit_s, f"credit for {size} bytes")  # fmt: skip
        if seq in self._spool and seq not in self._on_the_way:
            self._on_the_way[seq] = size
            self._bytes_on_the_way += size
            await self._send(Deliver(seq=seq), [record])

    def _has_credit(self, size: int) -> bool:
        # One trajectory may exceed the whole credit, or it could never leave.
        return not self._on_the_way or self._bytes_on_the_way + size <= self._credit

    async def _wait(self, ready: Callable[[], bool], seconds: float, what: str) -> None:
        if self._failure is None and not ready():
            await within(self._until(ready), seconds, self._who, f"{what} from the {self._hub}")
        if self._failure is not None:
            raise self._failure

    async def _until(self, ready: Callable[[], bool]) -> None:
        while self._failure is None and not ready():
            self._changed.clear()
            await self._changed.wait()

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        """Run until something fails; then everybody who waits gets the failure."""
        try:
            await work
        except SlipstreamError as error:
            self._failure = error
            self._inbox.put_nowait(None)
            if self._welcome is not None and not self._welcome.done():
                self._welcome.set_exception(error)
            self._changed.set()

    async def _read(self) -> None:
        while True:
            frames = await self._channel.receive()
            self._heard += 1
            await self._take(decode_message(frames[0]))

    async def _watch(self) -> None:
        """Ask a silent hub for signs of life, and give it up when `silence_s` worth of them are missing."""
        missing, heard = 0, self._heard
        while True:
            if not missing:
                silence = Deadline(self._limits.silence_s, self._who, f"a sign of life of the {self._hub}")
            await asyncio.sleep(self._limits.ping_s)
            missing, heard = (missing + 1, heard) if heard == self._heard else (0, self._heard)
            # Counted, not timed: a process that itself stood still has not waited for the hub.
            if missing * self._limits.ping_s >= self._limits.silence_s:
                raise silence.error()
            if missing:
                self._channel.send_now([encode_message(Ping())])

    async def _take(self, message: AnyMessage) -> None:
        FLIGHT.beat()
        match message:
            case Ack():
                self._acknowledged(message)
            case Grant():
                self._take_leases(message)
            case Weights():
                FLIGHT.note(f"serial {message.update.version.serial} announced")
                self._newest_serial = message.update.version.serial
                self._inbox.put_nowait(message)
            case Stop():
                FLIGHT.note(f"told to stop: {message.reason}")
                self._inbox.put_nowait(message)
            case Welcome():
                await self._welcomed(message)
            case Refused(retry=True):
                await self._channel.send([encode_message(self._hello())])
            case Refused():
                raise RefusedError(f"the {self._hub} refused {self._who}: {message.reason}")
            case Ping():
                pass
            case _:
                raise ProtocolError(
                    f"{self._who}: expected a message for actors, got {type(message).__name__}"
                )

    def _take_leases(self, message: Grant) -> None:
        for lease in message.leases:
            self._received[lease.evaluation >= 0] += 1
        fresh = tuple(lease for lease in message.leases if lease not in self._held)
        self._held.update(fresh)
        if fresh:
            self._inbox.put_nowait(Grant(leases=fresh, pinned=message.pinned))

    def _acknowledged(self, message: Ack) -> None:
        self._spool.acknowledge(message.seqs)
        for seq in message.seqs:
            self._bytes_on_the_way -= self._on_the_way.pop(seq, 0)
            lease = self._sent_leases.pop(seq, None)
            if lease is not None:
                self._held.discard(lease)
        self._changed.set()

    async def _welcomed(self, message: Welcome) -> None:
        """Start over with a hub that has just let this actor in, for the first time or again."""
        self._epoch, self._credit = message.epoch, message.credit_bytes
        FLIGHT.note(f"welcome in epoch {message.epoch}, {len(self._spool)} trajectories to send again")
        self._on_the_way.clear()
        self._bytes_on_the_way = 0
        self._received = [0, 0]
        again = self._welcome is None or self._welcome.done()
        for proof in self._proofs:
            await self._send(Proof(proof=proof))
        if again and message.update is not None and message.update.version.serial > self._newest_serial:
            self._inbox.put_nowait(Weights(update=message.update))
        if message.update is not None:
            self._newest_serial = max(self._newest_serial, message.update.version.serial)
        if self._welcome is not None and not self._welcome.done():
            self._welcome.set_result(message)
        self._tasks.append(asyncio.create_task(self._resend(self._spool.pending_seqs())))

    async def _resend(self, seqs: Sequence[int]) -> None:
        for seq in seqs:
            if seq in self._spool:
                await self._deliver(seq, self._spool.read(seq))
        if self._wanted is not None:
            await self.want(*self._wanted)
