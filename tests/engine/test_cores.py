"""Both clients' state machines, message by message, without sockets and without waiting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream import messages as m
from slipstream import synthetic
from slipstream.deadlines import Deadlines, Waits
from slipstream.errors import DeadlineError, RefusedError
from slipstream.spool import Spool
from slipstream.transport.actor_core import ActorCore
from slipstream.transport.core import PeerCore
from slipstream.transport.learner_core import LearnerCore
from slipstream.types import Lease, Split, TaskAttempt
from slipstream.wire import encode_trajectory

LIMITS = Deadlines(
    connect_s=10.0, credit_s=20.0, batch_s=30.0, drain_s=5.0, ping_s=1.0, silence_s=4.0
)  # fmt: skip
AGAIN = m.Refused(reason="say Hello", retry=True)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path / "a", limit_bytes=1 << 20)
    yield made
    made.close()


def actor(spool: Spool, *, joined: bool = True, credit: int = 1 << 20) -> ActorCore:
    core = ActorCore(spool, "run", "a", session="s", limits=LIMITS)
    core.join(0.0)
    if joined:
        assert kinds(core) == ["Hello"]
        core.take(m.Welcome(epoch=0, credit_bytes=credit), 0.0)
    return core


def learner(*, joined: bool = True) -> LearnerCore:
    core = LearnerCore("run", "l", session="s", limits=LIMITS)
    core.join(0, 0.0)
    if joined:
        assert kinds(core) == ["Hello"]
        core.take(m.Welcome(epoch=0), (), 0.0)
    return core


def sent(core: PeerCore, now: float = 0.0) -> list[m.Message]:
    """Return all that a core has to send."""
    messages = []
    while (outgoing := core.next_message(now)) is not None:
        messages.append(outgoing[0])
    return messages


def kinds(core: PeerCore, now: float = 0.0) -> list[str]:
    return [type(message).__name__ for message in sent(core, now)]


def lease(group: int) -> Lease:
    return Lease(attempt=TaskAttempt(task=group, seed=1, group=group, attempt=0), split=Split.TRAIN)


def deliver(core: ActorCore, group: int) -> int:
    seq = core.append(synthetic.answer_to(lease(group), serial=0, tokens=8))
    core.durable([seq])
    return seq


def test_waits_name_the_first_that_runs_out() -> None:
    waits = Waits("actor a")
    waits.begin("slow", "credit of the hub", 9.0, 1.0)
    waits.begin("quick", "Welcome of the hub", 3.0, 2.0)
    waits.begin("quick", "Welcome of the hub", 3.0, 4.0)
    assert (waits.ends_at, waits.began_at, set(waits)) == (5.0, 2.0, {"slow", "quick"})
    waits.check(4.9)
    with pytest.raises(DeadlineError, match="actor a waited 3 s for Welcome of the hub"):
        waits.check(5.0)
    waits.end("quick")
    assert (waits.ends_at, waits.began_at) == (10.0, 1.0)
    waits.end("slow")
    waits.check(1e9)


def test_a_record_leaves_only_when_it_is_durable(spool: Spool) -> None:
    core = actor(spool)
    seq = core.append(synthetic.answer_to(lease(0), serial=0, tokens=8))
    assert kinds(core) == []
    core.take(m.Welcome(epoch=1, credit_bytes=1 << 20), 0.0)
    assert kinds(core) == []
    core.durable([seq])
    assert sent(core) == [m.Deliver(seq=0)]


def test_credit_holds_records_back_in_order_and_is_a_wait(spool: Spool) -> None:
    size = len(encode_trajectory(synthetic.answer_to(lease(0), serial=0, tokens=8)))
    core = actor(spool, credit=size + 300)
    for group in range(3):
        deliver(core, group)
    assert sent(core) == [m.Deliver(seq=0)]
    assert "credit" in core.waits
    assert not core.delivered(1)
    core.take(m.Ack(seqs=(0,), bytes=size), 1.0)
    assert sent(core, 1.0) == [m.Deliver(seq=1)]
    assert core.waits.ends_at == 21.0
    with pytest.raises(DeadlineError, match=r"actor a waited 20 s for credit for \d+ bytes from the hub"):
        core.tick(21.0)


def test_what_was_on_the_way_is_sent_again_after_welcome(spool: Spool) -> None:
    core = actor(spool)
    for group in range(3):
        deliver(core, group)
    assert len(sent(core)) == 3
    core.take(m.Ack(seqs=(1,), bytes=1), 0.0)
    core.take(AGAIN, 5.0)
    assert kinds(core) == ["Hello"]
    core.want(1, 0)
    assert kinds(core) == []  # a hub that does not know this actor would drop it
    core.take(m.Welcome(epoch=1, credit_bytes=1 << 20), 5.0)
    assert [x for x in sent(core) if not isinstance(x, m.Want)] == [m.Deliver(seq=0), m.Deliver(seq=2)]


def test_many_refusals_are_answered_by_one_hello(spool: Spool) -> None:
    """Everything that was on its way to a hub that was started again is refused one by one."""
    core = actor(spool)
    said = []
    for _ in range(50):
        core.take(AGAIN, 5.0)
        said += kinds(core)
    assert said == ["Hello"]
    core.take(AGAIN, 6.0)  # that Hello was lost as well
    assert kinds(core) == ["Hello"]
    with pytest.raises(DeadlineError, match="actor a waited 10 s for Welcome"):
        core.tick(15.0)


def test_a_refusal_for_good_is_an_error(spool: Spool) -> None:
    with pytest.raises(RefusedError, match="the hub refused actor a: another process"):
        actor(spool).take(m.Refused(reason="another process took this name"), 0.0)


def test_leases_told_again_do_not_fill_places(spool: Spool) -> None:
    """The hub counts them as on their way to free places; without another Want it would give no more."""
    core = actor(spool)
    core.want(4, 0)
    core.take(m.Grant(leases=(lease(0),)), 0.0)
    sent(core)
    core.take(m.Welcome(epoch=1, credit_bytes=1 << 20), 0.0)
    core.take(m.Grant(leases=(lease(0), lease(1))), 0.0)
    wants = [message for message in sent(core) if isinstance(message, m.Want)]
    assert [(want.train, want.received_train) for want in wants] == [(4, 0), (4, 2)]
    granted = [event for event in core.events if isinstance(event, m.Grant)]
    assert [x.leases for x in granted] == [(lease(0),), (lease(1),)]


def test_a_silent_hub_is_pinged_and_then_given_up(spool: Spool) -> None:
    core = actor(spool)
    core.take(m.Ping(), 0.5)
    core.tick(1.0)
    assert kinds(core) == []
    core.tick(2.0)
    assert kinds(core) == ["Ping"]
    core.tick(500.0)  # this process stood still: that is one ping, not five hundred
    assert kinds(core) == ["Ping"]
    core.tick(501.0)
    with pytest.raises(DeadlineError, match="actor a waited 4 s for a sign of life of the hub"):
        core.tick(502.0)


def test_room_and_the_last_acknowledgements_are_waits(tmp_path: Path) -> None:
    core = actor(Spool(tmp_path / "small", limit_bytes=400_000))
    made = synthetic.answer_to(lease(0), serial=0, tokens=4000)
    assert core.has_room(made, 0.0)
    seq = core.append(made)
    core.durable([seq])
    assert not core.has_room(made, 0.0)
    assert not core.drained(5.0, 0.0)
    assert set(core.waits) == {"room", "drain"}
    core.take(m.Ack(seqs=(seq,), bytes=1), 1.0)
    assert core.has_room(made, 1.0)
    assert core.drained(5.0, 1.0)
    assert not set(core.waits)


def test_the_learner_says_again_what_a_hub_may_have_lost_in_its_order() -> None:
    core = learner()
    announced = synthetic.update(0, step=0)
    core.publish(announced)
    core.checkpointed(0, oldest=0)
    core.pull(0, 0.0)
    core.finish("done", 0.0)
    said = [
        m.Publish(update=announced),
        m.Checkpointed(step=0, oldest=0),
        m.Pull(step=0),
        m.Finish(reason="done"),
    ]
    assert sent(core) == said
    core.take(AGAIN, (), 3.0)
    core.report("train", {"step": 1.0})
    assert kinds(core) == ["Hello"]
    core.take(m.Welcome(epoch=0), (), 3.0)
    assert sent(core) == [*said[:2], m.Report(about="train", metrics={"step": 1.0}), *said[2:]]
    with pytest.raises(DeadlineError, match="learner l waited 5 s for Stop of the hub"):
        core.tick(5.0)
    core.take(m.Stop(reason="done"), (), 5.0)
    assert core.stopped
    core.tick(5.0)


def test_a_batch_damaged_on_its_way_is_asked_for_again() -> None:
    core = learner()
    core.pull(0, 0.0)
    sent(core)
    record: Any = encode_trajectory(synthetic.trajectory(8))
    batch = m.Batch(step=0, counters={}, versions=(), forks={}, history="h")
    core.take(batch, [record[:-1]], 0.0)
    assert core.take_batch() is None
    assert sent(core) == [m.Pull(step=0)]
    core.take(batch, [record], 0.0)
    pulled = core.take_batch()
    assert pulled is not None
    assert len(pulled.trajectories) == 1
    assert "batch" not in core.waits
