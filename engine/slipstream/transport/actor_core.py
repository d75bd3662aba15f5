"""Floor 4. The actor's side of the protocol as a state machine: spool, credit, leases, and nothing lost.

The life of a trajectory at its actor:

    append ──▶ in the spool ── durable ──▶ queued ── credit ──▶ on the way ── Ack ──▶ forgotten
                                             ▲                     │
                                             └───── Welcome ───────┘   a connection that was lost
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

from slipstream.deadlines import Deadlines
from slipstream.errors import ProtocolError
from slipstream.flight_recorder import FLIGHT
from slipstream.messages import (
    Ack,
    AnyMessage,
    Buffer,
    Deliver,
    Grant,
    Ping,
    Proof,
    Refused,
    Status,
    Stop,
    Want,
    Weights,
    Welcome,
)
from slipstream.transport.core import Outgoing, PeerCore
from slipstream.types import Lease, Split, TaskAttempt, Trajectory, TrajectoryId, WeightProof
from slipstream.wire import encode_trajectory, most_bytes

_KEPT_PROOFS: Final = 256
_LeaseKey = tuple[TaskAttempt, Split, int, int]
"""What a lease and its trajectory have in common, and no other lease has."""


class Records(Protocol):
    """What an actor keeps until it is acknowledged; `spool.Spool` on disk."""

    next_seq: int

    def write(self, seq: int, record: Buffer) -> int:
        """Write the record of one trajectory and return its `seq`; durable after a sync of the caller's."""

    def has_room(self, payload_bytes: int) -> bool:
        """Return whether a record of this size fits beside the others."""

    def acknowledge(self, seqs: Iterable[int]) -> None:
        """Forget records."""

    def read(self, seq: int) -> bytes:
        """Return a record."""

    def pending_seqs(self) -> list[int]:
        """Return the numbers of all records, oldest first."""

    def __len__(self) -> int:
        """Return how many records there are."""

    def __contains__(self, seq: int) -> bool:
        """Return whether a record is there."""


class ActorCore(PeerCore):
    """One actor's part of the conversation.

    Example: ``core.join(0.0); message = core.next_message(0.0); core.take(Welcome(epoch=0), 0.1)``.
    """

    def __init__(
        self, spool: Records, run: str, name: str, *, session: str, hub: str = "hub",
        limits: Deadlines | None = None,
    ) -> None:  # fmt: skip
        """Prepare; what `spool` still holds is sent once the hub has let this actor in."""
        super().__init__(role="actor", name=name, run=run, session=session, hub=hub, limits=limits)
        self.epoch, self.newest_serial = -1, -1
        self.events: deque[Welcome | Grant | Weights | Stop] = deque()
        """What concerns the caller: the first Welcome, leases not held yet, newer weights, Stop."""
        self._spool = spool
        self._credit = 0
        self._queue: deque[int] = deque()
        """Durable records to send, in order."""
        self._records: dict[int, Buffer] = {}
        """Those of them that are in memory anyway."""
        self._undurable: set[int] = set()
        self._on_the_way: dict[int, int] = {}
        """seq -> bytes, sent to this hub and not acknowledged."""
        self._bytes_on_the_way = 0
        self._held: set[_LeaseKey] = set()
        """Leases granted whose trajectory the hub has not acknowledged."""
        self._leases: dict[int, _LeaseKey] = {}
        """seq -> the lease it answers."""
        self._received = [0, 0]
        self._wanted: tuple[int, int] | None = None
        self._proofs: deque[WeightProof] = deque(maxlen=_KEPT_PROOFS)

    def join(self, now: float) -> None:
        """Say Hello."""
        self._join(now)

    def want(self, train: int, evaluate: int) -> None:
        """Say how many training and evaluation episodes could start now; replaces the last word."""
        self._wanted = (train, evaluate)
        if self.joined:
            self._outbox.append((Want(train=train, evaluate=evaluate, received_train=self._received[0],
                                      received_evaluate=self._received[1]), ()))  # fmt: skip

    def prove(self, proof: WeightProof) -> None:
        """Show the hub evidence that this actor holds a version."""
        self._proofs.append(proof)
        if self.joined:
            self._outbox.append((Proof(proof=proof), ()))

    def report(self, counters: Mapping[str, float]) -> None:
        """Send counters for display; nobody misses those of an actor that has not joined."""
        if self.joined:
            counts = {key: float(value) for key, value in counters.items()}
            self._outbox.append((Status(counters=counts), ()))

    def has_room(self, trajectory: Trajectory, now: float) -> bool:
        """Return whether the spool takes a trajectory; from the first no on, that is a wait."""
        if self._spool.has_room(most_bytes(trajectory)):
            self.waits.end("room")
            return True
        self.waits.begin("room", f"room in the spool from the {self._hub}", self.limits.credit_s, now)
        return False

    def append(self, trajectory: Trajectory) -> int:
        """Give a trajectory its identity, write it to the spool, and return its number.

        It is sent after `durable`.
        """
        seq = self._spool.next_seq
        identity = TrajectoryId(run=self._run, actor=self._name, epoch=self.epoch, seq=seq)
        record = encode_trajectory(trajectory, identity)
        self._spool.write(seq, record)
        self._undurable.add(seq)
        self._records[seq] = record
        self._leases[seq] = _key(trajectory)
        return seq

    def durable(self, seqs: Iterable[int]) -> None:
        """Let records go that are safe on disk."""
        for seq in seqs:
            self._undurable.discard(seq)
            self._queue.append(seq)

    def is_durable(self, seq: int) -> bool:
        """Return whether `durable` has been told of a record."""
        return seq not in self._undurable

    def delivered(self, seq: int) -> bool:
        """Return whether a record is on its way to the hub, or acknowledged."""
        return seq in self._on_the_way or seq not in self._spool

    def drained(self, seconds: float, now: float) -> bool:
        """Return whether everything is acknowledged; from the first no on, that is a wait."""
        if len(self._spool):
            self.waits.begin("drain", f"the last acknowledgements from the {self._hub}", seconds, now)
            return False
        self.waits.end("drain")
        return True

    def next_message(self, now: float) -> Outgoing | None:
        """Return the next message to send: a record only as far as the hub's credit goes."""
        if self._outbox:
            return self._outbox.popleft()
        if not self.joined or not self._queue:
            return None
        seq = self._queue[0]
        record = self._records.get(seq)
        if record is None:
            if seq not in self._spool:
                self._queue.popleft()
                return self.next_message(now)
            record = self._records[seq] = self._spool.read(seq)
        size = len(record)
        # One trajectory may exceed the whole credit, or it could never leave.
        if self._on_the_way and self._bytes_on_the_way + size > self._credit:
            self.waits.begin("credit", f"credit for {size} bytes from the {self._hub}", self.limits.credit_s,
                             now)  # fmt: skip
            return None
        self.waits.end("credit")
        self._queue.popleft()
        del self._records[seq]
        self._on_the_way[seq] = size
        self._bytes_on_the_way += size
        return Deliver(seq=seq), (record,)

    def take(self, message: AnyMessage, now: float) -> None:
        """Take one message of the hub in; raises RefusedError and ProtocolError."""
        self._hear()
        match message:
            case Ack():
                self._acknowledged(message.seqs)
            case Grant():
                self._take_leases(message)
            case Weights():
                FLIGHT.note(f"serial {message.update.version.serial} announced")
                self.newest_serial = message.update.version.serial
                self.events.append(message)
            case Stop():
                FLIGHT.note(f"told to stop: {message.reason}")
                self.events.append(message)
            case Welcome():
                self._take_welcome(message)
            case Refused():
                self._refused(message, now)
            case Ping():
                pass
            case _:
                raise ProtocolError(self._unexpected(message))

    def _take_leases(self, message: Grant) -> None:
        for lease in message.leases:
            self._received[lease.evaluation >= 0] += 1
        fresh = tuple(lease for lease in message.leases if _key(lease) not in self._held)
        self._held.update(map(_key, fresh))
        if fresh:
            self.events.append(Grant(leases=fresh, pinned=message.pinned))
        if len(fresh) < len(message.leases) and self._wanted is not None:
            # The hub took the others off the free places, as if they would fill some.
            self.want(*self._wanted)

    def _acknowledged(self, seqs: Sequence[int]) -> None:
        self._spool.acknowledge(seqs)
        for seq in seqs:
            self._bytes_on_the_way -= self._on_the_way.pop(seq, 0)
            self._records.pop(seq, None)
            lease = self._leases.pop(seq, None)
            if lease is not None:
                self._held.discard(lease)

    def _take_welcome(self, message: Welcome) -> None:
        """Start over with a hub that has just let this actor in, for the first time or again."""
        first = self.epoch < 0
        self._welcomed()
        self.epoch, self._credit = message.epoch, message.credit_bytes
        FLIGHT.note(f"welcome in epoch {message.epoch}, {len(self._spool)} trajectories to send again")
        self._on_the_way.clear()
        self._bytes_on_the_way, self._received = 0, [0, 0]
        self._queue = deque(seq for seq in self._spool.pending_seqs() if seq not in self._undurable)
        self._outbox += [(Proof(proof=proof), ()) for proof in self._proofs]
        if first:
            self.events.append(message)
        elif message.update is not None and message.update.version.serial > self.newest_serial:
            self.events.append(Weights(update=message.update))
        if message.update is not None:
            self.newest_serial = max(self.newest_serial, message.update.version.serial)
        if self._wanted is not None:
            self.want(*self._wanted)


def _key(one: Lease | Trajectory) -> _LeaseKey:
    return one.attempt, one.split, one.evaluation, one.issue
