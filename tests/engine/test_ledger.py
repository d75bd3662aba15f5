"""The hub's protocol in any order of events: nothing lost or doubled, the gate kept, the books balanced."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

from ledger_rig import CONFIG, Interleavings, Rig, facts, hello, ready

from slipstream import messages as m
from slipstream import synthetic
from slipstream.config import BatchConfig
from slipstream.errors import StorageError
from slipstream.events import State
from slipstream.history import extend
from slipstream.ingest import IngestLog, read_events
from slipstream.ledger import Ledger
from slipstream.types import Outcome, Split, WeightUpdate
from slipstream.wire import encode_trajectory


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.ledger.check_books()
    made.log.close()


def test_the_gate_opens_whole_groups_and_reopens_with_a_version(rig: Rig) -> None:
    peer, _ = ready(rig)
    leases = rig.want(peer, 100)
    # (max_slip 1 + version 0 + 1) * batch 4 = 8 trajectories: groups 0..3.
    assert [(x.attempt.group, x.attempt.attempt) for x in leases] == [
        (g, a) for g in range(4) for a in (0, 1)
    ]
    assert {x.attempt.task - x.attempt.group for x in leases} == {0}
    assert rig.want(peer, 100) == []
    rig.publish(1)
    assert len(rig.leases[peer]) == 12


def test_nothing_is_leased_before_a_proof(rig: Rig) -> None:
    rig.learner()
    announced = rig.publish(0)
    peer = rig.actor()
    assert rig.want(peer, 4, 2) == []
    wrong = dataclasses.replace(synthetic.proof(announced), checksum64=1)
    (refused,) = rig.say(peer, m.Proof(proof=wrong))
    assert isinstance(refused, m.Refused)
    assert "expected checksum 00000000000003e8, got 0000000000000001" in refused.reason
    off = dataclasses.replace(synthetic.proof(announced), canary_logprobs=(-0.5, -1.502))
    (refused,) = rig.say(peer, m.Proof(proof=off))
    assert isinstance(refused, m.Refused)
    assert "within 0.001 nats" in refused.reason
    assert rig.ledger.refused_proofs == 2
    close = dataclasses.replace(synthetic.proof(announced), canary_logprobs=(-0.5, -1.5009))
    replies = rig.say(peer, m.Proof(proof=close))
    assert [len(r.leases) for r in replies if isinstance(r, m.Grant)] == [4, 2]


def test_a_paused_hub_gives_no_leases_and_takes_what_comes(rig: Rig) -> None:
    peer, announced = ready(rig)
    (lease,) = rig.want(peer, 1)
    rig.ledger.paused = True
    assert rig.want(peer, 3) == []
    rig.deliver(peer, rig.made(peer, lease, announced.version.serial))
    assert rig.ledger.books()["buffered"] == 1
    rig.ledger.paused = False
    assert len(rig.want(peer, 3)) == 3


def test_leases_on_the_way_are_not_granted_twice(rig: Rig) -> None:
    peer, _ = ready(rig)
    rig.say(peer, m.Want(train=3, evaluate=0, received_train=0, received_evaluate=0))
    assert len(rig.leases[peer]) == 3
    # The actor has four free places, but has not seen the three leases above yet.
    rig.say(peer, m.Want(train=4, evaluate=0, received_train=0, received_evaluate=0))
    assert len(rig.leases[peer]) == 4


def test_many_leases_come_in_messages_small_enough(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"batch": BatchConfig(groups=500, group_size=4)})
    log = IngestLog(tmp_path)
    ledger = Ledger(config, "run", log, lambda _: "")
    ledger.handle(b"l", hello("learner", "l", "l"), (), 0.0)
    announced = synthetic.update(0, step=0)
    ledger.handle(b"l", m.Publish(update=announced), (), 0.0)
    ledger.handle(b"a", hello("actor", "a", "a"), (), 0.0)
    ledger.handle(b"a", m.Proof(proof=synthetic.proof(announced)), (), 0.0)
    ledger.handle(b"a", m.Want(train=4000, evaluate=0, received_train=0, received_evaluate=0), (), 0.0)
    replies = ledger.progress(0.0)
    grants = [m.decode_message(m.encode_message(reply)) for _, reply, _ in replies]
    assert sum(len(grant.leases) for grant in grants if isinstance(grant, m.Grant)) == 4000
    log.close()


def test_a_batch_holds_the_oldest_complete_groups_in_order(rig: Rig) -> None:
    peer, announced = ready(rig)
    leases = rig.want(peer, 8)
    straggler = leases[2]  # group 1
    for lease in reversed([x for x in leases if x is not straggler]):
        rig.deliver(peer, rig.made(peer, lease, announced.version.serial))
    batch = rig.pull(0)
    assert batch is not None
    assert [(t.attempt.group, t.attempt.attempt) for t in batch] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert rig.pull(1) is None
    rig.deliver(peer, rig.made(peer, straggler, announced.version.serial))
    arrived = [r for to, r, _ in rig.replies if to == b"learner" and isinstance(r, m.Batch)]
    assert [batch.step for batch in arrived] == [0, 1]
    again = rig.pull(0)
    assert again is not None
    assert [t.identity for t in again] == [t.identity for t in batch]


def test_resent_duplicate_failed_and_unproven_trajectories_are_booked_apart(rig: Rig) -> None:
    peer, announced = ready(rig)
    serial = announced.version.serial
    first, second, third, _ = rig.want(peer, 4)
    made = rig.made(peer, first, serial)
    rig.deliver(peer, made)
    rig.deliver(peer, made)
    rig.deliver(peer, rig.made(peer, first, serial))
    failed = dataclasses.replace(rig.made(peer, second, serial), outcome=Outcome.INFRASTRUCTURE_FAILURE)
    rig.deliver(peer, failed)
    rig.deliver(peer, rig.made(peer, third, serial + 1))
    books = rig.ledger.books()
    assert {key: value for key, value in books.items() if value} == {
        "made": 4,
        "buffered": 1,
        "duplicate": 1,
        "failed_infrastructure": 1,
        "unproven": 1,
        "leased": 1,
        "waiting": 2,
    }
    again = rig.want(peer, 2)
    assert [(x.attempt, x.issue) for x in again] == [(second.attempt, 1), (third.attempt, 1)]


def test_tokens_of_a_server_need_the_proof_of_that_life_of_it(rig: Rig) -> None:
    """Neither the actor's own proof nor that of the server's former life, or of another serial, will do."""
    peer, announced = ready(rig)
    serial = announced.version.serial
    rig.publish(1)

    def proven_by(server: str, of: WeightUpdate) -> None:
        assert rig.say(peer, m.Proof(proof=dataclasses.replace(synthetic.proof(of), server=server))) == []

    def fate(samplers: tuple[tuple[str, int], ...], sampled: int) -> str:
        before = rig.ledger.books()
        (lease,) = rig.want(peer, 1)
        made = dataclasses.replace(rig.made(peer, lease, sampled), samplers=samplers)
        rig.deliver(peer, made)
        after = rig.ledger.books()
        return "".join(name for name in ("buffered", "unproven") if after[name] > before[name])

    assert fate((("a#1", serial),), serial) == "unproven"
    proven_by("a#1", announced)
    assert fate((("a#1", serial),), serial) == "buffered"
    assert fate((("a#2", serial),), serial) == "unproven"
    assert fate((("a#1", serial), ("b#1", serial)), serial) == "unproven"
    # What is named must be all of what was sampled.
    assert fate((("a#1", serial),), serial + 1) == "unproven"
    assert fate((("a#1", serial + 1),), serial + 1) == "unproven"
    assert fate((), serial) == "buffered"
    wrong = dataclasses.replace(synthetic.proof(announced), server="c#1", checksum64=1)
    (refused,) = rig.say(peer, m.Proof(proof=wrong))
    assert isinstance(refused, m.Refused)
    assert fate((("c#1", serial),), serial) == "unproven"


@pytest.mark.parametrize("damage", ["sender", "attempt", "split"])
def test_bad_trajectories_are_quarantined_and_acknowledged(rig: Rig, damage: str) -> None:
    peer, announced = ready(rig)
    (lease,) = rig.want(peer, 1)
    made = rig.made(peer, lease, announced.version.serial)
    if damage == "sender":
        made = dataclasses.replace(made, identity=dataclasses.replace(made.identity, actor="b"))
    if damage == "attempt":
        made = dataclasses.replace(made, attempt=dataclasses.replace(made.attempt, group=99, task=99))
    if damage == "split":
        made = dataclasses.replace(made, split=Split.HELDOUT)
    record = encode_trajectory(made)
    replies = rig.say(peer, m.Deliver(seq=7), [record])
    assert [r.seqs for r in replies if isinstance(r, m.Ack)] == [(7,)]
    assert rig.ledger.books()["quarantined"] == 1
    assert rig.bad[0].startswith(record)
    assert rig.ledger.books()["leased"] == 1


@pytest.mark.parametrize("damage", ["bit", "frames", "short"])
def test_a_record_damaged_on_its_way_is_asked_for_again(rig: Rig, damage: str) -> None:
    """The actor still has it whole: an acknowledgement would lose it."""
    peer, announced = ready(rig)
    (lease,) = rig.want(peer, 1)
    record = encode_trajectory(rig.made(peer, lease, announced.version.serial))
    flipped = bytes(record[:40]) + bytes([record[40] ^ 1]) + bytes(record[41:])
    damaged = {"bit": [flipped], "frames": [record, b"more"], "short": [b"x"]}[damage]
    for _ in range(3):
        (refused,) = rig.say(peer, m.Deliver(seq=rig.seq), damaged)
        assert isinstance(refused, m.Refused)
        assert refused.retry
        assert f"record {rig.seq} was damaged" in refused.reason
    assert rig.ledger.books()["quarantined"] == 0
    if damage == "bit":
        rig.say(peer, m.Deliver(seq=rig.seq), [record])
        assert rig.ledger.books()["buffered"] == 1
        return
    # What is never whole is damaged where it lies, and must not wedge its actor.
    assert [r.seqs for r in rig.say(peer, m.Deliver(seq=rig.seq), damaged) if isinstance(r, m.Ack)] == [
        (rig.seq,)
    ]
    assert rig.ledger.books()["quarantined"] == 1
    assert rig.bad == [b"".join(bytes(frame) for frame in damaged)]


def test_damage_to_another_process_of_the_name_does_not_count(rig: Rig) -> None:
    """Both number their records from 0."""
    for session in ("one", "two", "three"):
        peer = rig.actor(session=session)
        (refused,) = rig.say(peer, m.Deliver(seq=0), [b"x"])
        assert isinstance(refused, m.Refused)
    assert rig.ledger.books()["quarantined"] == 0


def test_groups_too_old_at_hand_out_are_dropped_and_make_room(rig: Rig) -> None:
    peer, announced = ready(rig)
    old = announced.version.serial
    leases = rig.want(peer, 8)
    kept, late = leases[:4], leases[4:]
    for lease in kept:
        rig.deliver(peer, rig.made(peer, lease, old))
    assert rig.pull(0) is not None
    for step in (1, 2):
        announced = rig.publish(step)
        rig.say(peer, m.Proof(proof=synthetic.proof(announced)))
        for lease in rig.want(peer, 4):
            rig.deliver(peer, rig.made(peer, lease, announced.version.serial))
        if step == 1:
            assert rig.pull(1) is not None
    for lease in late:
        rig.deliver(peer, rig.made(peer, lease, old))
    batch = rig.pull(2)  # slip 2 > max_slip 1 for the late groups 2 and 3
    assert batch is not None
    assert {t.attempt.group for t in batch}.isdisjoint({2, 3})
    assert rig.ledger.books()["dropped_by_slip"] == 4
    again = rig.want(peer, 8)  # no task is skipped: they are owed again, under a new issue
    assert [lease for lease in again if lease.attempt.group in {2, 3}] == [
        dataclasses.replace(lease, issue=lease.issue + 1) for lease in late
    ]
    rig.ledger.check_books()


def test_after_a_rollback_leases_wait_for_their_turn(rig: Rig) -> None:
    """Episodes of later batches would be too old when they are trained."""
    peer, announced = ready(rig)
    done = 0
    for step in range(4):
        rig.want(peer, 8)
        for lease in rig.leases[peer][done:]:
            rig.deliver(peer, rig.made(peer, lease, announced.version.serial))
            done += 1
        assert rig.pull(step) is not None
        announced = rig.publish(step + 1)
        rig.say(peer, m.Proof(proof=synthetic.proof(announced)))
    rig.learner(step=1, session="another life")
    rig.publish(1)
    assert rig.pull(1) is not None  # groups 2 and 3, sampled before the fork
    rig.publish(2)
    assert rig.pull(2) is not None  # groups 4 and 5, sampled at the fork
    assert rig.ledger.books()["dropped_by_slip"] == 8  # groups 6 to 9, at least two steps apart
    rig.want(peer, 8)

    def leased_again() -> set[int]:
        return {lease.attempt.group for lease in rig.leases[peer] if lease.issue == 1}

    assert leased_again() == {6, 7}  # (max_slip 1 + version 2 + 1) * batch 4 - 12 trained = 2 groups
    rig.publish(3)
    assert leased_again() == {6, 7, 8, 9}
    rig.ledger.check_books()


def test_a_learner_that_resumes_gets_its_trajectories_back(rig: Rig) -> None:
    peer, announced = ready(rig)
    for lease in rig.want(peer, 8):
        rig.deliver(peer, rig.made(peer, lease, announced.version.serial))
    first, second = rig.pull(0), rig.pull(1)
    assert first is not None
    assert second is not None
    welcome = rig.learner(step=1, session="another life")
    assert (welcome.epoch, welcome.next_serial, welcome.fork_step) == (1, 1, 1)
    assert rig.ledger.books()["trained"] == 4
    assert rig.ledger.state.accepted == 1 * 4 + 4
    rig.publish(1)
    again = rig.pull(1)
    assert again is not None
    assert [t.identity for t in again] == [t.identity for t in second]


def test_members_of_a_branch_given_up_are_drawn_again(tmp_path: Path) -> None:
    """Killed amid a batch: what was sampled beyond the checkpoint cannot be trained, its group mates can."""
    rig = Rig(tmp_path, CONFIG.model_copy(update={"max_slip": 0}))
    peer, announced = ready(rig)
    for lease in rig.want(peer, 4):
        rig.deliver(peer, rig.made(peer, lease, announced.version.serial))
    first = rig.pull(0)
    assert first is not None
    ahead = rig.publish(1)
    rig.say(peer, m.Proof(proof=synthetic.proof(ahead)))
    early, early_mate, late, late_mate = rig.want(peer, 4)
    rig.deliver(peer, rig.made(peer, early, ahead.version.serial))
    rig.learner(step=0, session="another life")
    again = rig.publish(0)
    rig.say(peer, m.Proof(proof=synthetic.proof(again)))
    assert rig.pull(0) is not None
    newest = rig.publish(1)
    rig.say(peer, m.Proof(proof=synthetic.proof(newest)))
    # It lay in a spool: sampled on the same branch, it arrives when that has been given up.
    rig.deliver(peer, rig.made(peer, late, ahead.version.serial))
    for lease in (early_mate, late_mate):
        rig.deliver(peer, rig.made(peer, lease, newest.version.serial))
    assert rig.pull(1) is None
    assert rig.ledger.books()["dropped_by_slip"] == 2
    drawn = rig.want(peer, 4)
    assert drawn == [dataclasses.replace(lease, issue=1) for lease in (early, late)]
    for lease in drawn:
        rig.deliver(peer, rig.made(peer, lease, newest.version.serial))
    batch = rig.pull(1)
    assert batch is not None
    assert {int(serial) for t in batch for serial in t.versions if serial >= 0} == {newest.version.serial}
    rig.ledger.check_books()
    rig.restart()
    rig.ledger.check_books()


def test_a_learner_that_only_reconnects_is_not_rolled_back(rig: Rig) -> None:
    peer, announced = ready(rig)
    for lease in rig.want(peer, 4):
        rig.deliver(peer, rig.made(peer, lease, announced.version.serial))
    assert rig.pull(0) is not None
    welcome = rig.learner(step=0)
    assert (welcome.epoch, rig.ledger.state.steps) == (0, 1)


def test_a_learner_ahead_of_the_log_is_refused(rig: Rig) -> None:
    (refused,) = rig.say(b"learner", hello("learner", "learner", "l", step=3))
    assert isinstance(refused, m.Refused)
    assert "the hub's log knows batches 0 to 0, the learner resumes from step 3" in refused.reason


def trained_batches(rig: Rig, peer: bytes, count: int) -> None:
    """Train batches one after another, each on trajectories of the newest weights."""
    first = rig.ledger.state.steps
    for step in range(first, first + count):
        serial = rig.ledger.state.next_serial - 1
        for lease in rig.want(peer, 4):
            rig.deliver(peer, rig.made(peer, lease, serial))
        assert rig.pull(step) is not None
        rig.say(peer, m.Proof(proof=synthetic.proof(rig.publish(step + 1))))


def test_a_proof_of_forgotten_weights_is_no_fault_and_proves_nothing(rig: Rig) -> None:
    """An actor that stood still while the others went on would end otherwise, and with it its place."""
    peer, _ = ready(rig)
    late = rig.actor("late")
    trained_batches(rig, peer, 1)
    missed = rig.ledger.state.updates[1]
    for step in range(1, 80):
        trained_batches(rig, peer, 1)
        rig.say(b"learner", m.Checkpointed(step=step + 1, oldest=step))
    assert missed.version.serial not in rig.ledger.state.updates
    assert rig.say(late, m.Proof(proof=synthetic.proof(missed))) == []
    assert ("late", "s") not in rig.ledger.state.proven
    unheard = synthetic.update(rig.ledger.state.next_serial, step=80)
    (refused,) = rig.say(late, m.Proof(proof=synthetic.proof(unheard)))
    assert isinstance(refused, m.Refused)
    assert f"proof of serial {unheard.version.serial}: expected a published serial" in refused.reason


def test_a_log_of_another_past_is_refused(rig: Rig) -> None:
    """A checkpoint and the log must tell of the same batches, or something is trained twice or never."""
    peer, _ = ready(rig)
    trained_batches(rig, peer, 2)
    told = [reply.history for _, reply, _ in rig.replies if isinstance(reply, m.Batch)]
    identities = [rig.ledger.state.batches[step] for step in range(2)]
    assert told == [extend("", identities[0]), extend(extend("", identities[0]), identities[1])]
    (refused,) = rig.say(b"learner", hello("learner", "learner", "another", 2, told[0]))
    assert isinstance(refused, m.Refused)
    assert f"the hub's log has {told[1]}, the checkpoint was trained on {told[0]}" in refused.reason
    assert isinstance(rig.say(b"learner", hello("learner", "l", "another", 2, told[1]))[0], m.Welcome)


def test_what_every_checkpoint_covers_is_forgotten_but_not_taken_twice(rig: Rig) -> None:
    peer, _ = ready(rig)
    trained_batches(rig, peer, 12)
    batches = dict(rig.ledger.state.batches)
    again = rig.ledger.state.items[batches[0][0]]
    record = rig.log.read(again.position)
    rig.say(b"learner", m.Checkpointed(step=12, oldest=10))
    state = rig.ledger.state
    assert sorted(state.batches) == [10, 11]
    assert set(state.items) == {*batches[10], *batches[11]}
    assert (state.steps, state.forgotten, rig.ledger.books()["trained"]) == (12, 40, 48)
    rig.ledger.check_books()
    (ack,) = rig.say(peer, m.Deliver(seq=1), [record])
    assert isinstance(ack, m.Ack)
    assert rig.ledger.books()["made"] == 48
    (refused,) = rig.say(b"learner", hello("learner", "l", "new", 9, "x"))
    assert isinstance(refused, m.Refused)
    assert "knows batches 10 to 12, the learner resumes from step 9" in refused.reason
    # The old learner only reconnects: its step is that of its start.
    assert isinstance(rig.say(b"learner", hello("learner", "learner", "l", 0))[0], m.Welcome)


def test_a_log_is_shortened_to_what_a_restart_needs(rig: Rig) -> None:
    peer, _ = ready(rig)
    trained_batches(rig, peer, 12)
    assert rig.log.shorten(rig.ledger.state.oldest_position, retain_bytes=0) == 0
    rig.say(b"learner", m.Checkpointed(step=12, oldest=11))
    segments = sorted(rig.folder.glob("*.log"))
    assert 4 < len(segments) < 20
    size = sum(path.stat().st_size for path in segments)
    assert rig.log.shorten(rig.ledger.state.oldest_position, retain_bytes=size) == 0
    removed = rig.log.shorten(rig.ledger.state.oldest_position, retain_bytes=0)
    assert removed > 1
    assert sorted(rig.folder.glob("*.log")) == segments[removed:]
    before = facts(rig.ledger.state)
    rig.restart()
    assert facts(rig.ledger.state) == before
    assert isinstance(next(iter(read_events(rig.folder))).event, State)
    rig.learner(11, session="resumed")
    rig.publish(11)
    pulled = rig.pull(11)
    assert pulled is not None
    assert len(pulled) == CONFIG.batch.trajectories


def test_damage_is_found_where_a_restart_needs_the_log_and_nowhere_else(rig: Rig) -> None:
    peer, _ = ready(rig)
    trained_batches(rig, peer, 12)
    rig.say(b"learner", m.Checkpointed(step=12, oldest=11))
    needed = rig.ledger.state.oldest_position
    assert needed is not None
    first, *_, last = sorted(rig.folder.glob("*.log"))
    first.write_bytes(b"x" * 100)
    rig.restart()
    rig.log.close()
    kept = rig.folder / f"{needed >> 40:06d}.log"
    assert kept not in (first, last)
    data = bytearray(kept.read_bytes())
    data[(needed & ((1 << 40) - 1)) + 40] ^= 1
    kept.write_bytes(data)
    with pytest.raises(StorageError, match=f"{kept} is damaged"):
        rig.start()
    rig.log.close()
    for number in range(int(kept.stem) + 1):
        (rig.folder / f"{number:06d}.log").unlink()
    with pytest.raises(StorageError, match=f"{kept} is missing: it holds trajectories that are still to be"):
        rig.start()
    rig.log.close()
    rig.log = IngestLog(rig.folder.parent / "another")


def test_versions_of_the_protocol_are_compared_by_name(rig: Rig) -> None:
    greeting = hello("actor", "a", "s")
    for field, value in (("protocol", 99), ("schema", "feed"), ("run", "other")):
        fields = {name: getattr(greeting, name) for name in greeting.__struct_fields__} | {field: value}
        (refused,) = rig.say(b"x", m.Hello(**fields))
        assert isinstance(refused, m.Refused)
        assert not refused.retry
        assert str(value) in refused.reason
        assert str(getattr(greeting, field)) in refused.reason


def test_a_new_process_of_an_actor_takes_over_at_once(rig: Rig) -> None:
    old, announced = ready(rig)
    lease, unsent = rig.want(old, 2)
    before = rig.made(old, lease, announced.version.serial)
    new = rig.actor(session="new")
    assert rig.epochs[new] == 1
    (refused,) = rig.say(old, m.Deliver(seq=1), [encode_trajectory(before)])
    assert isinstance(refused, m.Refused)
    assert not refused.retry
    # The spool of the old process is replayed by the new one, and its proof still counts for it.
    rig.deliver(new, before)
    assert rig.ledger.books()["buffered"] == 1
    rig.say(new, m.Proof(proof=synthetic.proof(announced)))
    assert [(x.attempt, x.issue) for x in rig.want(new, 1)] == [(unsent.attempt, 1)]


@pytest.mark.parametrize("role", ["actor", "learner"])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_process_that_was_replaced_never_comes_back(rig: Rig, role: str, restarted: bool) -> None:
    """Neither over a new connection nor to a hub started again: a learner would roll the run back."""
    for session in ("old", "new"):
        assert [type(r) for r in rig.say(b"1" + session.encode(), hello(role, "x", session))] == [m.Welcome]
    if restarted:
        rig.restart()
    (refused,) = rig.say(b"2old", hello(role, "x", "old"))
    assert refused == m.Refused(reason="another process took this name")
    assert [type(r) for r in rig.say(b"2new", hello(role, "x", "new"))] == [m.Welcome]


def test_tokens_of_a_process_that_proved_nothing_do_not_count(rig: Rig) -> None:
    old, announced = ready(rig)
    (lease,) = rig.want(old, 1)
    new = rig.actor(session="new")
    rig.deliver(new, rig.made(new, lease, announced.version.serial))
    assert rig.ledger.books()["unproven"] == 1


def test_leases_time_out_and_lost_actors_free_theirs(rig: Rig) -> None:
    a, announced = ready(rig)
    b = rig.actor("b")
    rig.say(b, m.Proof(proof=synthetic.proof(announced)))
    (first,) = rig.want(a, 1)
    rig.ledger.lost(a)
    assert [(x.attempt, x.issue) for x in rig.want(b, 1)] == [(first.attempt, 1)]
    rig.now = 5.0
    rig.take(rig.ledger.tick(rig.now))
    assert rig.ledger.books()["waiting"] == 1
    rig.say(b, m.Ping())
    rig.now = 10.5
    rig.take(rig.ledger.tick(rig.now))
    assert rig.ledger.books()["waiting"] == 2
    assert (b, m.Ping(), ()) in rig.replies


def test_a_hub_started_again_behind_the_end_tells_whoever_joins(tmp_path: Path) -> None:
    rig = Rig(tmp_path, CONFIG.model_copy(update={"steps": 2}))
    peer, announced = ready(rig)
    for lease in rig.want(peer, 0, 2):
        rig.deliver(peer, rig.made(peer, lease, announced.version.serial))
    trained_batches(rig, peer, 2)
    for lease in rig.want(peer, 0, 2):
        rig.deliver(peer, rig.made(peer, lease, lease.evaluation))
    rig.restart()
    assert [type(r) for r in rig.say(b"b/s", hello("actor", "b", "s"))] == [m.Welcome]
    rig.learner(2, session="l")
    rig.say(b"learner", m.Checkpointed(step=2, oldest=0))
    rig.restart()
    assert [type(r) for r in rig.say(b"c/s", hello("actor", "c", "s"))] == [m.Welcome, m.Stop]
    rig.log.close()


def test_an_evaluation_is_pinned_booked_apart_and_told(rig: Rig) -> None:
    peer, announced = ready(rig)
    serial = announced.version.serial
    one, two = rig.want(peer, 0, 2)
    assert (one.evaluation, one.split, one.attempt.task, two.attempt.task) == (serial, Split.HELDOUT, 0, 1)
    rig.deliver(
        peer, dataclasses.replace(rig.made(peer, one, serial), outcome=Outcome.INFRASTRUCTURE_FAILURE)
    )
    (again,) = rig.want(peer, 0, 1)
    assert (again.attempt, again.issue) == (one.attempt, 1)
    rig.deliver(peer, rig.made(peer, again, serial))
    unsolved = dataclasses.replace(rig.made(peer, two, serial), scores=())
    rig.deliver(peer, unsolved)
    (done,) = [r for to, r, _ in rig.replies if isinstance(r, m.Evaluated)]
    assert (done.serial, done.step, done.success, done.count, done.replayed) == (serial, 0, 0.5, 2, False)
    assert rig.ledger.books()["made"] == 0
    assert rig.ledger.books()["evaluation_evaluated"] == 2
    rig.learner(step=0)
    assert [r.replayed for _, r, _ in rig.replies if isinstance(r, m.Evaluated)] == [False, True]


def test_weights_published_again_while_they_are_evaluated_are_not_evaluated_again(rig: Rig) -> None:
    peer, announced = ready(rig)
    leases = rig.want(peer, 0, 2)
    for number in range(2):
        rig.learner(step=0, session=f"resumed-{number}")
        assert rig.publish(step=0).version.serial > announced.version.serial
    assert rig.ledger.state.evaluation_serials == [announced.version.serial]
    for lease in leases:
        rig.deliver(peer, rig.made(peer, lease, announced.version.serial))
    assert rig.ledger.state.evaluation_serials == []
    (done,) = [r for _, r, _ in rig.replies if isinstance(r, m.Evaluated)]
    assert (done.serial, done.step, done.replayed) == (announced.version.serial, 0, False)


def test_who_joins_after_the_end_is_told_to_stop(rig: Rig) -> None:
    """An actor that was away when the learner finished would wait for ever."""
    rig.learner()
    assert rig.say(b"learner", m.Finish(reason="done")) == [m.Stop(reason="done")]
    assert rig.say(b"late", hello("actor", "late", "s"))[1:] == [m.Stop(reason="done")]
    rig.learner(session="resumed")
    assert rig.say(b"late", hello("actor", "late", "s"))[1:] == []


def test_an_unknown_peer_is_asked_to_say_hello(rig: Rig) -> None:
    (refused,) = rig.say(b"stranger", m.Ping())
    assert isinstance(refused, m.Refused)
    assert refused.retry


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
