"""Floor 4. The hub's protocol without sockets: who may join, run, deliver and train.

    who             waits for              released by
    an actor        a lease                the gate: accepted + running <= (max_slip + version + 1) * batch
    the learner     a batch                the last trajectory of its last group
    an evaluation   its held-out episodes  actors with evaluation slots, proven for its serial
    a lease         its trajectory         delivery, time-out, loss or replacement of its actor

Everything durable is an event, appended to the journal and applied to `LedgerState`; peers and their
wishes are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

import msgspec

from slipstream import events
from slipstream import messages as m
from slipstream.config import RunConfig
from slipstream.dispatch import Dispatcher, Give
from slipstream.errors import DamageError, FrameError
from slipstream.flight_recorder import FLIGHT
from slipstream.ingest import Entry
from slipstream.leases import slot_of
from slipstream.ledger_books import check_books
from slipstream.ledger_snapshot import restored
from slipstream.ledger_state import LedgerState
from slipstream.patience import Patience
from slipstream.peers import Peer, Pulling, metrics_rows, snapshot
from slipstream.receiving import (
    canary_tolerance,
    check_sender,
    describe,
    refuse_line,
    refuse_proof,
    verdict_on,
)
from slipstream.telling import batch_of, evaluated
from slipstream.transport.channel import Reply
from slipstream.types import Lease
from slipstream.wire import inspect_trajectory, schema_hash

_PING_AFTER_S: Final = 5.0
_SWEEP_EVERY_S: Final = 1.0
_REPLACED: Final = "another process took this name"
_DAMAGED_KNOWN: Final = 1024
_DAMAGED_TIMES: Final = 4
"""Arrivals of one record with a wrong check after which the damage is not the network's."""
_LEASES_PER_GRANT: Final = 256
"""Keeps a Grant well under the bound of a control message."""


class Journal(Protocol):
    """Where events go; `ingest.IngestLog` on disk."""

    def append(self, event: events.Event, record: m.Buffer = b"") -> int:
        """Add an event, with a trajectory's checked record, and return its position."""

    def flush(self) -> None:
        """Make everything appended durable."""

    def read(self, position: int) -> bytes:
        """Return the record behind an event."""

    def replay(self) -> Iterator[Entry]:
        """Yield every event from the beginning."""


class Ledger:
    """Answers messages; the caller flushes before it sends the answers.

    Example: ``replies = ledger.handle(b"peer", Hello(...), [], now=0.0); ledger.flush()``.
    """

    def __init__(
        self, config: RunConfig, run: str, journal: Journal, quarantine: Callable[[Sequence[m.Buffer]], str],
    ) -> None:  # fmt: skip
        """Rebuild the state from the journal; `quarantine` keeps bad bytes and returns where."""
        self._config, self._run, self._journal, self._quarantine = config, run, journal, quarantine
        self._tolerance = canary_tolerance(config)
        self.state = _replayed(config, journal)
        self._dispatcher = Dispatcher(config, self.state, self._log)
        self._peers: dict[bytes, Peer] = {}
        self._replaced: set[bytes] = set()
        self._leased_at: dict[tuple[events.Slot, int], float] = {}
        self._damaged: Counter[tuple[str, int]] = Counter()
        """(session, seq) -> how often the bytes of that record did not match their CRC."""
        self._patience = Patience(config.hub.give_up_after)
        self._pulling: Pulling | None = None
        # A hub that was started again behind the end has not heard the learner, and perhaps never will.
        self._finished = m.Finish(reason="the run is over") if self.state.is_over else None
        """The learner's last word: whoever joins after it is told to stop."""
        self._reports: list[dict[str, Any]] = []
        self._next_sweep = 0.0
        self.refused_proofs = 0
        self.paused = False
        """No leases while it is set, as on a disk that is nearly full."""

    def flush(self) -> None:
        """Make everything handled so far durable."""
        self._journal.flush()

    def handle(self, peer: bytes, message: m.Message, frames: Sequence[m.Buffer], now: float) -> list[Reply]:
        """Take one message of a peer and return the replies to whomever it concerns."""
        if isinstance(message, m.Hello):
            return self._hello(peer, message, now)
        who = self._peers.get(peer)
        if who is None:
            gone = peer in self._replaced
            reason = _REPLACED if gone else "this hub does not know you yet; say Hello"
            return [(peer, m.Refused(reason=reason, retry=not gone), ())]
        who.heard_s = now
        handle = self._from_actor if who.role == "actor" else self._from_learner
        return handle(peer, who, message, frames, now)

    def _from_actor(
        self, peer: bytes, who: Peer, message: m.Message, frames: Sequence[m.Buffer], _now: float
    ) -> list[Reply]:
        match message:
            case m.Deliver():
                return [self._deliver(peer, who, message, frames)]
            case m.Want():
                self._want(who, message)
                return []
            case m.Proof():
                return self._proof(peer, who, message)
            case m.Status():
                who.counters = dict(message.counters)
                return []
            case m.Ping():
                return [(peer, message, ())]
        return [(peer, m.Refused(reason=f"an actor may not send {type(message).__name__}"), ())]

    def _from_learner(
        self, peer: bytes, who: Peer, message: m.Message, _frames: Sequence[m.Buffer], now: float
    ) -> list[Reply]:
        match message:
            case m.Publish():
                return self._publish(peer, message)
            case m.Pull():
                self._pulling = Pulling(peer=peer, step=message.step, since_s=now)
                return []
            case m.Checkpointed():
                if message.step != self.state.checkpoint_step:
                    self._log(events.CheckpointPublished(step=message.step, oldest=message.oldest))
                return []
            case m.Report():
                self._dispatcher.measure(message.metrics)
                self._reports.append({"kind": message.about, **message.metrics})
                return []
            case m.Finish():
                self._finished = message
                # The learner's own Stop tells it that all it said before has been heard.
                return [(other, m.Stop(reason=message.reason), ()) for other in self._peers]
            case m.Ping():
                return [(peer, message, ())]
        return [(peer, m.Refused(reason=f"the {who.role} may not send {type(message).__name__}"), ())]

    def tick(self, now: float) -> list[Reply]:
        """Release leases that timed out, give up silent actors, and ask quiet ones for a sign of life."""
        if now < self._next_sweep:
            return []
        self._next_sweep = now + _SWEEP_EVERY_S
        limit = self._config.hub.lease_timeout_s
        self._release_late(limit, now)
        replies = self.progress(now)
        for peer, who in list(self._peers.items()):
            if who.role == "actor" and now - who.heard_s > limit:
                self.lost(peer)
            elif now - max(who.heard_s, who.pinged_s) > _PING_AFTER_S:
                who.pinged_s = now
                replies.append((peer, m.Ping(), ()))
        return replies

    def _release_late(self, limit: float, now: float) -> None:
        desks = (self.state.training, self.state.heldout)
        leased = [(slot, lease.issue) for desk in desks for slot, (_, lease) in desk.leased.items()]
        # After a restart a lease's age is unknown: it starts again.
        self._leased_at = {key: self._leased_at.get(key, now) for key in leased}
        late = tuple(key[0] for key, since in self._leased_at.items() if now - since > limit)
        if late:
            self._log(events.Released(slots=late, reason=f"not returned within {limit:g} s"))

    def lost(self, peer: bytes) -> None:
        """Forget a peer that is gone; its leases are free at once."""
        who = self._peers.pop(peer, None)
        if who is None:
            return
        if who.role == "actor":
            slots = [
                slot for desk in (self.state.training, self.state.heldout) for slot in desk.slots_of(who.name)
            ]
            if slots:
                self._log(events.Released(slots=tuple(slots), reason=f"actor {who.name} is gone"))
        elif self._pulling is not None and self._pulling.peer == peer:
            self._pulling = None

    def books(self) -> dict[str, int]:
        """Return the books (ledger_state.py)."""
        return self.state.books()

    def check_books(self) -> None:
        """Raise StorageError when the books do not balance."""
        check_books(self.state, self._config)

    def take_reports(self) -> list[dict[str, Any]]:
        """Return the learner's rows since the last call, with the hub's books and the actors' counters."""
        reports, self._reports = self._reports, []
        counts = self.books() | {"tokens_received": self.state.tokens_received}
        return metrics_rows(reports, counts, self._peers.values(), self.state.course.metrics())

    def status(self, now: float) -> dict[str, object]:
        """Return a snapshot for display."""
        return snapshot(self.state, self._peers.values(), self._pulling, self.refused_proofs, now)

    def _log(self, event: events.AnyEvent, record: m.Buffer = b"") -> None:
        self.state.apply(event, self._journal.append(event, record))
        if words := events.brief(event):
            FLIGHT.note(words)

    def _hello(self, peer: bytes, hello: m.Hello, now: float) -> list[Reply]:
        reason = self._refuse_hello(hello)
        if reason:
            return [(peer, m.Refused(reason=reason), ())]
        for other, who in list(self._peers.items()):
            same_name = who.name == hello.name or hello.role == "learner"
            if who.role == hello.role and same_name and (other != peer):
                del self._peers[other]
                if who.session != hello.session:
                    self._replaced.add(other)
        self._peers[peer] = Peer(role=hello.role, name=hello.name, session=hello.session, heard_s=now)
        return self._admit_actor(peer, hello) if hello.role == "actor" else self._admit_learner(peer, hello)

    def _refuse_hello(self, hello: m.Hello) -> str:
        for name, expected, got in (
            ("protocol version", m.PROTOCOL, hello.protocol),
            ("schema hash", schema_hash(), hello.schema),
            ("run", self._run, hello.run),
        ):
            if expected != got:
                return f"{name}: the hub has {expected}, {hello.role} {hello.name} has {got}"
        if hello.role not in ("actor", "learner"):
            return f"role: expected actor or learner, got {hello.role}"
        if self.state.is_replaced(hello.role, hello.name, hello.session):
            return _REPLACED
        return refuse_line(hello, self.state) if hello.role == "learner" else ""

    def _admit_actor(self, peer: bytes, hello: m.Hello) -> list[Reply]:
        epoch = self.state.epochs.get(hello.name, -1) + 1
        self._log(events.Epoch(actor=hello.name, epoch=epoch, session=hello.session))
        welcome = m.Welcome(epoch=epoch, credit_bytes=self._config.hub.credit_bytes, update=self.state.newest)
        # The same process again: what was granted and perhaps lost on the way is granted once more.
        stop = [] if self._finished is None else [(peer, m.Stop(reason=self._finished.reason), ())]
        return [(peer, welcome, ()), *self._held_by(peer, hello.name), *stop]

    def _held_by(self, peer: bytes, name: str) -> Iterator[Reply]:
        for desk in (self.state.training, self.state.heldout):
            yield from self._grants(peer, [lease for holder, lease in desk.leased.values() if holder == name])

    def _grants(self, peer: bytes, leases: Sequence[Lease]) -> Iterator[Reply]:
        for start in range(0, len(leases), _LEASES_PER_GRANT):
            some = tuple(leases[start : start + _LEASES_PER_GRANT])
            self._peers[peer].granted[some[0].evaluation >= 0] += len(some)
            yield peer, m.Grant(leases=some, pinned=self.state.updates.get(some[0].evaluation)), ()

    def _admit_learner(self, peer: bytes, hello: m.Hello) -> list[Reply]:
        self._pulling = self._finished = None
        state = self.state
        if hello.session != state.learner_session:
            if hello.step < state.steps:
                self._log(events.RolledBack(step=hello.step))
            self._log(
                events.Incarnation(number=state.incarnation + 1, fork_step=hello.step, session=hello.session)
            )
        welcome = m.Welcome(epoch=state.incarnation, next_serial=state.next_serial, fork_step=state.fork_step)
        known = [
            done
            for done in state.evaluations
            if done.step <= state.fork_step or state.versions[done.serial].incarnation == state.incarnation
        ]
        return [(peer, welcome, ()), *((peer, evaluated(done, replayed=True), ()) for done in known)]

    def _want(self, who: Peer, want: m.Want) -> None:
        for kind, (free, received) in enumerate(
            ((want.train, want.received_train), (want.evaluate, want.received_evaluate))
        ):
            on_the_way = max(0, who.granted[kind] - received)
            who.wants[kind] = max(0, free - on_the_way)

    def _deliver(self, peer: bytes, who: Peer, message: m.Deliver, frames: Sequence[m.Buffer]) -> Reply:
        ack = m.Ack(seqs=(message.seq,), bytes=sum(map(len, frames)))
        try:
            if len(frames) != 1:
                raise DamageError(f"Deliver: expected one record behind it, got {len(frames)} frames")
            arrival = inspect_trajectory(frames[0])
            if self._damaged:
                self._damaged.pop((who.session, message.seq), None)
            identity = arrival.header.identity
            check_sender(identity, run=self._run, actor=who.name, epoch=self.state.epochs[who.name])
            if identity not in self.state.seen:
                event = describe(arrival, verdict_on(arrival, self.state, self._config))
                self._log(event, frames[0])
                if self._patience.is_over(event) and self._dispatcher.give_up(event.slot):
                    self._patience.forget(event.slot)
        except FrameError as error:
            if isinstance(error, DamageError) and self._may_come_again(who.session, message.seq):
                # Joining again makes the actor send from its spool all that was not acknowledged.
                return peer, m.Refused(reason=f"record {message.seq} was damaged: {error}", retry=True), ()
            self._damaged.pop((who.session, message.seq), None)
            file = self._quarantine(frames)
            self._log(events.Quarantined(actor=who.name, file=file, reason=str(error)))
        return peer, ack, ()

    def _may_come_again(self, session: str, number: int) -> bool:
        """Return whether the sender is to send a damaged record again: it may be whole in its spool."""
        self._damaged[session, number] += 1
        if len(self._damaged) > _DAMAGED_KNOWN:
            del self._damaged[next(iter(self._damaged))]
        return self._damaged[session, number] < _DAMAGED_TIMES

    def _proof(self, peer: bytes, who: Peer, message: m.Proof) -> list[Reply]:
        proof = message.proof
        update = self.state.updates.get(proof.serial)
        if update is None and proof.serial < self.state.next_serial:
            # Forgotten since: an actor that joins again repeats the proofs it keeps, however old.
            return []
        reason = f"proof of serial {proof.serial}: expected a published serial"
        if update is not None:
            reason = refuse_proof(proof, update, self._tolerance)
        if reason:
            self.refused_proofs += 1
            return [(peer, m.Refused(reason=reason), ())]
        if (proof.server, proof.serial) not in self.state.proven.get((who.name, who.session), ()):
            self._log(
                events.Proven(actor=who.name, session=who.session, serial=proof.serial, server=proof.server)
            )
        return []

    def _publish(self, peer: bytes, message: m.Publish) -> list[Reply]:
        version, state = message.update.version, self.state
        if state.updates.get(version.serial) == message.update:
            return []
        expected = (state.incarnation, state.fork_step, state.next_serial)
        if (version.incarnation, version.fork_step) != expected[:2] or version.serial < state.next_serial:
            return [
                (
                    peer,
                    m.Refused(
                        reason=f"published version: expected incarnation, fork step, serial >= {expected}, "
                        f"got {version}"
                    ),
                    (),
                )
            ]
        known = state.evaluation_of(message.update)
        self._log(events.Published(update=message.update))
        replies: list[Reply] = [
            (other, m.Weights(update=message.update), ())
            for other, who in self._peers.items()
            if who.role == "actor"
        ]
        if known is not None:
            done = msgspec.structs.replace(known, serial=version.serial)
            replies.append((peer, evaluated(done, replayed=True), ()))
        return replies

    def progress(self, now: float) -> list[Reply]:
        """Hand out the batch, end the evaluation and give the leases that have become possible."""
        self._dispatcher.filter_groups()
        replies = [*self._answer_pull(), *self._give_leases(now)]
        done = self._dispatcher.end_evaluation()
        if done is not None:
            learners = [peer for peer, who in self._peers.items() if who.role == "learner"]
            replies += [(peer, evaluated(done), ()) for peer in learners]
            replies += self._give_leases(now)
        return replies

    def _answer_pull(self) -> Iterator[Reply]:
        pulling, state = self._pulling, self.state
        if pulling is None:
            return
        if not state.first_batch <= pulling.step <= state.steps:
            self._pulling = None
            reason = f"batch {pulling.step}: expected the next, {state.steps}, or one handed out before"
            yield pulling.peer, m.Refused(reason=reason), ()
            return
        if pulling.step == state.steps and not self._dispatcher.hand_out(pulling.step):
            return
        self._pulling = None
        records = [
            self._journal.read(state.items[identity].position) for identity in state.batches[pulling.step]
        ]
        yield pulling.peer, batch_of(state, pulling.step), records

    def _give_leases(self, now: float) -> Iterator[Reply]:
        if self.paused:
            return
        if self._dispatcher.may_train():
            yield from self._give(0, self._dispatcher.train, now)
        if self._dispatcher.may_evaluate():
            yield from self._give(1, self._dispatcher.evaluate, now)

    def _give(self, kind: int, give: Give, now: float) -> Iterator[Reply]:
        """Give leases of one kind to actors that want some and have proven any weights."""
        wanting = {peer: who for peer, who in self._peers.items()
                   if who.wants[kind] and self.state.proven.get((who.name, who.session))}  # fmt: skip
        if not wanting:
            return
        wants = {peer: who.wants[kind] for peer, who in wanting.items()}
        names = {peer: who.name for peer, who in wanting.items()}
        for peer, leases in give(wants, names):
            self._peers[peer].wants[kind] -= len(leases)
            self._leased_at.update({(slot_of(lease), lease.issue): now for lease in leases})
            yield from self._grants(peer, leases)


def _replayed(config: RunConfig, journal: Journal) -> LedgerState:
    state = LedgerState(config)
    for entry in journal.replay():
        FLIGHT.beat()
        if isinstance(entry.event, events.State):
            # The first event of a shortened log; of any other segment it is what came before, once more.
            state = restored(config, entry.event)
        else:
            state.apply(entry.event, entry.position)
    return state
