"""Clients and hub over ZeroMQ and in memory: the same conversation, credit, deadlines, refusals."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from slipstream import messages as m
from slipstream import records, synthetic
from slipstream.config import BatchConfig, EvaluationConfig, HubConfig, RunConfig
from slipstream.deadlines import Deadlines
from slipstream.errors import AddressError, DeadlineError, RefusedError
from slipstream.ingest import IngestLog, read_events
from slipstream.ledger import Ledger
from slipstream.spool import Spool
from slipstream.transport import dealer
from slipstream.transport.client import ActorClient, LearnerClient, PulledBatch
from slipstream.transport.memory import MemoryHub
from slipstream.transport.zeromq import DealerChannel, RouterServer, SyncDealerChannel, merge_acks
from slipstream.types import Lease

CONFIG = RunConfig(
    steps=4,
    max_slip=1,
    batch=BatchConfig(groups=2, group_size=2),
    evaluation=EvaluationConfig(every=2, tasks=2),
    hub=HubConfig(credit_bytes=1 << 16),
)
QUICK = Deadlines(
    connect_s=20.0, send_s=20.0, credit_s=20.0, batch_s=20.0, drain_s=20.0, ping_s=0.05, silence_s=20.0
)


def make_ledger(folder: Path) -> tuple[Ledger, IngestLog]:
    log = IngestLog(folder)
    return Ledger(CONFIG, "run", log, lambda _: "nowhere"), log


class Serving:
    """A hub in a thread, on a real socket."""

    def __init__(self, folder: Path, address: str = "tcp://127.0.0.1:*") -> None:
        self.ledger, self._log = make_ledger(folder)
        self.server = RouterServer(self.ledger, address, lost=self.ledger.lost)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self.server.run, args=(self._stopping.is_set,))
        self._thread.start()

    def stop(self) -> str:
        self._stopping.set()
        self._thread.join()
        self.server.close()
        self._log.close()
        return self.server.address


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    hub = Serving(tmp_path / "log")
    yield hub
    hub.stop()


async def act(client: ActorClient, *, until: Callable[[], bool] = lambda: False) -> int:
    """Answer every lease until told to stop; returns the number of episodes."""
    welcome = await client.connect()
    serial, episodes = -1, 0
    if welcome.update is not None:
        serial = welcome.update.version.serial
        await client.prove(synthetic.proof(welcome.update))
    await client.want(4, 2)
    while not until():
        match await client.receive():
            case m.Weights(update=announced):
                serial = announced.version.serial
                await client.prove(synthetic.proof(announced))
            case m.Grant(leases=leases):
                for lease in leases:
                    await client.send(synthetic.answer_to(lease, serial=serial))
                    episodes += 1
                await client.want(4, 2)
            case m.Stop():
                break
    await client.drain()
    await client.close()
    return episodes


def learn(client: LearnerClient, pull: Callable[[int], PulledBatch]) -> list[list[tuple[int, int]]]:
    """Train CONFIG.steps steps and return what each batch held."""
    welcome = client.connect(0)
    held = []
    for step in range(CONFIG.steps):
        client.publish(synthetic.update(welcome.next_serial + step, step=step, incarnation=welcome.epoch))
        batch = pull(step)
        held.append([(t.attempt.group, t.attempt.attempt) for t in batch.trajectories])
        client.report("train", {"step": step})
    client.publish(
        synthetic.update(welcome.next_serial + CONFIG.steps, step=CONFIG.steps, incarnation=welcome.epoch)
    )
    return held


EXPECTED = [
    [(2 * step, 0), (2 * step, 1), (2 * step + 1, 0), (2 * step + 1, 1)] for step in range(CONFIG.steps)
]


def test_a_run_over_zeromq(serving: Serving, tmp_path: Path) -> None:
    address = serving.server.address

    def train() -> tuple[list[list[tuple[int, int]]], list[int]]:
        client = LearnerClient(SyncDealerChannel(address), "run", "learner", deadlines=QUICK)

        def pull(step: int) -> PulledBatch:
            batch = client.pull(step)
            assert batch is not None
            return batch

        held = learn(client, pull)
        steps: list[int] = []
        while len(steps) < 3:
            steps += [event.step for event in client.events(5.0) if isinstance(event, m.Evaluated)]
        client.finish("done")
        client.close()
        return held, steps

    async def both() -> tuple[int, tuple[list[list[tuple[int, int]]], list[int]]]:
        spool = Spool(tmp_path / "a.spool")
        actor = ActorClient(DealerChannel(address), spool, "run", "a", deadlines=QUICK)
        return await asyncio.gather(act(actor), asyncio.to_thread(train))

    episodes, (held, evaluated) = asyncio.run(asyncio.wait_for(both(), 60))
    assert held == EXPECTED
    assert sorted(evaluated) == [0, 2, 4]
    books = serving.ledger.books()
    assert books["made"] + books["evaluation_evaluated"] == episodes
    serving.ledger.check_books()


def memory_run(folder: Path) -> tuple[list[list[tuple[int, int]]], list[str]]:
    """Run in one thread and return the batches and the kinds of events in the log."""
    ledger, log = make_ledger(folder)
    hub = MemoryHub(ledger)
    learner = LearnerClient(hub.sync_channel("learner"), "run", "learner", deadlines=QUICK)
    spool = Spool(folder / "a.spool")
    actor = ActorClient(hub.channel("a"), spool, "run", "a", deadlines=QUICK)

    async def both() -> list[list[tuple[int, int]]]:
        acting = asyncio.create_task(act(actor))
        welcome = learner.connect(0)
        held = []
        for step in range(CONFIG.steps):
            learner.publish(synthetic.update(welcome.next_serial + step, step=step))
            while (batch := learner.pull(step, 0.0)) is None:  # noqa: ASYNC110 - nobody else may run it
                await asyncio.sleep(0)
            held.append([(t.attempt.group, t.attempt.attempt) for t in batch.trajectories])
        learner.finish("done")
        await acting
        return held

    held = asyncio.run(asyncio.wait_for(both(), 60))
    learner.close()
    ledger.check_books()
    log.close()
    return held, [type(entry.event).__name__ for entry in read_events(folder)]


def test_a_run_in_memory_is_the_same_and_deterministic(tmp_path: Path) -> None:
    held, first = memory_run(tmp_path / "1")
    assert held == EXPECTED
    assert memory_run(tmp_path / "2") == (held, first)


def test_clients_outlive_a_restarted_hub(tmp_path: Path) -> None:
    hub = Serving(tmp_path / "log")
    address = hub.server.address
    learner = LearnerClient(SyncDealerChannel(address), "run", "learner", deadlines=QUICK)
    actor = ActorClient(DealerChannel(address), Spool(tmp_path / "a.spool"), "run", "a", deadlines=QUICK)

    def pull(step: int) -> PulledBatch:
        """Restart the hub while the learner waits for its second batch."""
        nonlocal hub
        if step == 1:
            hub.stop()
            hub = Serving(tmp_path / "log", address)
        batch = learner.pull(step)
        assert batch is not None
        return batch

    async def both() -> list[list[tuple[int, int]]]:
        acting = asyncio.create_task(act(actor))
        held = await asyncio.to_thread(learn, learner, pull)
        learner.finish("done")
        await acting
        return held

    held = asyncio.run(asyncio.wait_for(both(), 60))
    learner.close()
    assert held == EXPECTED
    assert hub.ledger.state.incarnation == 0
    assert hub.ledger.books()["duplicate"] == 0
    hub.ledger.check_books()
    hub.stop()


def test_a_learner_that_waits_in_slices_joins_a_restarted_hub(tmp_path: Path) -> None:
    hub = Serving(tmp_path / "log")
    limits = Deadlines(ping_s=0.2)
    learner = LearnerClient(SyncDealerChannel(hub.server.address), "run", "learner", deadlines=limits)
    learner.connect(0)
    assert learner.pull(0, 0.0) is None
    hub = Serving(tmp_path / "log", hub.stop())
    while not hub.ledger.status(0.0)["learner_present"]:
        assert learner.pull(0, 0.01) is None
    learner.close()
    hub.stop()


def with_actor(
    address: str,
    folder: Path,
    use: Callable[[ActorClient], Awaitable[object]],
    limits: Deadlines,
    run: str = "run",
) -> None:
    async def go() -> None:
        client = ActorClient(DealerChannel(address), Spool(folder / "a.spool"), run, "a", deadlines=limits)
        try:
            await use(client)
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(go(), 60))


def test_a_foreign_run_is_refused_by_name(serving: Serving, tmp_path: Path) -> None:
    with pytest.raises(
        RefusedError, match=r"127.0.0.1:\d+ refused actor a: run: the hub has run, actor a has other"
    ):
        with_actor(serving.server.address, tmp_path, lambda client: client.connect(), QUICK, run="other")


def test_nobody_answering_ends_in_a_deadline(tmp_path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as silent:
        port = silent.bind_to_random_port("tcp://127.0.0.1")
        limits = Deadlines(connect_s=0.2)
        with pytest.raises(
            DeadlineError, match=rf"actor a waited 0.2 s for Welcome of the hub at tcp://127.0.0.1:{port}"
        ):
            with_actor(f"tcp://127.0.0.1:{port}", tmp_path, lambda client: client.connect(), limits)
        learner = LearnerClient(
            SyncDealerChannel(f"tcp://127.0.0.1:{port}"), "run", "learner", deadlines=limits
        )
        with pytest.raises(
            DeadlineError, match=rf"learner learner waited 0.2 s for Welcome of the hub at .*{port}"
        ):
            learner.connect(0)
        learner.close()


def test_a_hub_that_dies_is_noticed(tmp_path: Path) -> None:
    hub = Serving(tmp_path / "log")
    address = hub.server.address
    limits = Deadlines(ping_s=0.05, silence_s=0.3)

    async def wait(client: ActorClient) -> None:
        try:
            await client.connect()
        finally:
            await asyncio.to_thread(hub.stop)
        await client.receive()

    with pytest.raises(
        DeadlineError, match=rf"actor a waited 0.3 s for a sign of life of the hub at {address}"
    ):
        with_actor(address, tmp_path, wait, limits)


def test_sending_waits_for_credit(tmp_path: Path) -> None:
    """With room for one trajectory on the way, a hub that does not acknowledge blocks the second."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as hub:
        port = hub.bind_to_random_port("tcp://127.0.0.1")

        def answer() -> None:
            peer, _ = hub.recv_multipart()
            hub.send_multipart([peer, m.encode_message(m.Welcome(epoch=0, credit_bytes=1000))])

        async def send_two(client: ActorClient) -> None:
            await asyncio.gather(client.connect(), asyncio.to_thread(answer))
            await client.send(synthetic.trajectory(8))
            await client.send(synthetic.trajectory(8))

        limits = Deadlines(connect_s=20.0, credit_s=0.3, ping_s=5.0)
        with pytest.raises(
            DeadlineError, match=r"actor a waited 0.3 s for credit for \d+ bytes from the hub at"
        ):
            with_actor(f"tcp://127.0.0.1:{port}", tmp_path, send_two, limits)
        delivered = [m.decode_message(hub.recv_multipart()[1])]
        assert delivered == [m.Deliver(seq=0)]
        assert not hub.poll(0)
    spool = Spool(tmp_path / "a.spool")
    assert [seq for seq, _ in spool.pending()] == [0, 1]
    spool.close()


async def polled(ready: Callable[[], bool]) -> None:
    """Wait for what another thread or task does."""
    async with asyncio.timeout(30):
        while not ready():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_episodes_that_end_together_share_an_fdatasync_and_nothing_leaves_before_it(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = LearnerClient(SyncDealerChannel(serving.server.address), "run", "learner", deadlines=QUICK)
    learner.connect(0)
    learner.publish(synthetic.update(0, step=0))
    go, syncs = threading.Event(), []

    def sync(file: int, path: object) -> None:
        assert go.wait(60)
        records.sync(file, path)
        syncs.append(path)

    monkeypatch.setattr("slipstream.spool.sync", sync)

    async def deliver() -> None:
        spool = Spool(tmp_path / "a.spool", durability="power")
        client = ActorClient(DealerChannel(serving.server.address), spool, "run", "a", deadlines=QUICK)
        welcome = await client.connect()
        assert welcome.update is not None
        await client.prove(synthetic.proof(welcome.update))
        await client.want(8, 0)
        leases: list[Lease] = []
        while len(leases) < 8:
            word = await client.receive()
            leases += word.leases if isinstance(word, m.Grant) else ()
        sending = [asyncio.create_task(client.send(synthetic.answer_to(one, serial=0))) for one in leases]
        await polled(lambda: len(spool) == 8)
        await client.report({"a": 1.0})
        await polled(lambda: any(who.counters for who in serving.ledger._peers.values()))
        # The hub has heard what was said after them, and none of them.
        assert serving.ledger.books()["made"] == 0
        go.set()
        await asyncio.gather(*sending)
        await client.drain()
        await client.close()

    asyncio.run(asyncio.wait_for(deliver(), 60))
    learner.close()
    assert serving.ledger.books()["made"] == 8
    assert len(syncs) <= 2, "each episode had an fdatasync of its own"


def test_a_stalled_actor_loses_no_acknowledgement(serving: Serving, tmp_path: Path) -> None:
    """Messages that arrive together with the end of a wait must not vanish with it."""
    learner = LearnerClient(SyncDealerChannel(serving.server.address), "run", "learner", deadlines=QUICK)
    learner.connect(0)
    learner.publish(synthetic.update(0, step=0))
    learner.close()

    async def stall(client: ActorClient) -> None:
        await client.connect()
        for _ in range(20):
            await client.send(synthetic.trajectory(8))
            await asyncio.sleep(0)
            time.sleep(0.06)  # noqa: ASYNC251 - the stall is what is tested
        await client.drain()

    limits = Deadlines(ping_s=0.05)
    with_actor(serving.server.address, tmp_path, stall, limits)
    assert serving.ledger.books()["quarantined"] == 20  # no lease was ever granted for them


def test_garbage_on_the_socket_is_refused_and_counted(serving: Serving) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(serving.server.address)
        for frames in ([b"\xff" * 100], [b""], [b"x"] * 40):
            stranger.send_multipart(frames)
            assert stranger.poll(60_000)
            (frame,) = stranger.recv_multipart()
            assert isinstance(m.decode_message(frame), m.Refused)
    assert serving.server.malformed == 3


def test_an_address_in_use_is_one_sentence(serving: Serving, tmp_path: Path) -> None:
    ledger, log = make_ledger(tmp_path / "other")
    with pytest.raises(
        AddressError, match=r"hub.address: cannot bind tcp://127.0.0.1:\d+ \(Address already in use\)"
    ):
        RouterServer(ledger, serving.server.address)
    with pytest.raises(AddressError, match="expected tcp://HOST:PORT"):
        DealerChannel("nonsense")
    log.close()


def test_a_lease_said_again_and_acknowledged_in_one_turn_is_not_run_twice(tmp_path: Path) -> None:
    """After the hub's restart Hello and a delivery may reach it together."""
    made = synthetic.trajectory(8)
    lease = Lease(attempt=made.attempt, split=made.split)

    async def run_it(hub: zmq.Socket[bytes], client: ActorClient) -> list[object]:
        def say(peer: bytes, *words: m.Message) -> None:
            for _, word, _ in merge_acks([(peer, word, ()) for word in words]):
                hub.send_multipart([peer, m.encode_message(word)])

        joining = asyncio.create_task(client.connect())
        await asyncio.sleep(0)
        peer = (await asyncio.to_thread(hub.recv_multipart))[0]
        say(peer, m.Welcome(epoch=0, credit_bytes=1 << 20), m.Grant(leases=(lease,)))
        await joining
        heard = [await client.receive()]
        await client.send(synthetic.answer_to(lease, serial=0, tokens=8))
        await asyncio.to_thread(hub.recv_multipart)
        again = m.Grant(leases=(lease,))
        say(peer, m.Ack(seqs=(0,), bytes=1), m.Welcome(epoch=1, credit_bytes=1 << 20), again)
        await client.drain()
        say(peer, m.Stop(reason="done"))
        return [*heard, await client.receive()]

    with zmq.Context() as context, context.socket(zmq.ROUTER) as hub:
        port = hub.bind_to_random_port("tcp://127.0.0.1")
        heard: list[object] = []

        async def use(client: ActorClient) -> None:
            heard.extend(await run_it(hub, client))

        with_actor(f"tcp://127.0.0.1:{port}", tmp_path, use, Deadlines(ping_s=30.0))
    assert heard == [m.Grant(leases=(lease,)), m.Stop(reason="done")]


def test_acknowledgements_of_a_peer_are_merged() -> None:
    replies = [
        (b"a", m.Ack(seqs=(1,), bytes=5), ()),
        (b"b", m.Ping(), ()),
        (b"a", m.Ack(seqs=(2,), bytes=6), ()),
    ]
    assert merge_acks(replies) == [(b"b", m.Ping(), ()), (b"a", m.Ack(seqs=(1, 2), bytes=11), ())]


def test_a_connection_that_goes_between_asking_and_sending_is_waited_for(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = SyncDealerChannel(serving.server.address)
    real, tries = dealer.send_frames, []

    def gone_at_first(*arguments: Any) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise zmq.Again
        real(*arguments)

    monkeypatch.setattr(dealer, "send_frames", gone_at_first)
    assert channel.send([m.encode_message(m.Ping())], 10.0)
    answer = channel.receive(10.0)
    assert answer is not None
    assert isinstance(m.decode_message(answer[0]), m.Refused)
    assert len(tries) == 2
    channel.close()
