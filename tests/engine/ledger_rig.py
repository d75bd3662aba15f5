"""A ledger on a real log, and all that its clients would remember: what tests of the protocol share."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from slipstream import messages as m
from slipstream import synthetic
from slipstream.config import BatchConfig, EnvironmentConfig, EvaluationConfig, HubConfig, RunConfig
from slipstream.ingest import IngestLog
from slipstream.ledger import Ledger
from slipstream.ledger_snapshot import restored, snapshot
from slipstream.ledger_state import LedgerState
from slipstream.staleness import VersionTable
from slipstream.types import Lease, Outcome, Score, ScoreKind, Trajectory, TrajectoryId, WeightUpdate
from slipstream.wire import decode_trajectory, encode_trajectory, schema_hash

CONFIG = RunConfig(
    steps=50,
    max_slip=1,
    batch=BatchConfig(groups=2, group_size=2),
    evaluation=EvaluationConfig(every=2, tasks=2),
    environment=EnvironmentConfig(timeout_s=5.0),
    hub=HubConfig(lease_timeout_s=10.0),
)
SEGMENT_BYTES = 4096
"""So small that a log has several segments after a few dozen events."""


def hello(role: str, name: str, session: str, step: int = 0, history: str = "") -> m.Hello:
    return m.Hello(
        role=role, name=name, run="run", protocol=m.PROTOCOL, schema=schema_hash(), session=session,
        step=step, history=history,
    )  # fmt: skip


class Rig:
    """A ledger on a real log, and all that clients would remember."""

    def __init__(self, folder: Path, config: RunConfig = CONFIG) -> None:
        self.folder, self.config, self.now = folder, config, 0.0
        self.bad: list[bytes] = []
        self.replies: list[tuple[bytes, m.Message, Sequence[m.Buffer]]] = []
        self.leases: dict[bytes, list[Lease]] = {}
        self.epochs: dict[bytes, int] = {}
        self.seq = 0
        self.start()

    def start(self) -> None:
        self.log = IngestLog(self.folder, segment_bytes=SEGMENT_BYTES)
        self.ledger = Ledger(self.config, "run", self.log, self.quarantine)
        self.log.check(self.ledger.state.oldest_position)
        self.log.opening = lambda: snapshot(self.ledger.state)

    def restart(self) -> None:
        self.log.close()
        self.start()

    def quarantine(self, frames: Sequence[m.Buffer]) -> str:
        self.bad.append(b"".join(frames))
        return str(len(self.bad))

    def say(self, peer: bytes, message: m.Message, frames: Sequence[m.Buffer] = ()) -> list[m.Message]:
        """Handle one message and return what came back to its sender."""
        replies = self.ledger.handle(peer, message, frames, self.now) + self.ledger.progress(self.now)
        self.ledger.flush()
        self.take(replies)
        return [reply for to, reply, _ in replies if to == peer]

    def take(self, replies: Sequence[tuple[bytes, m.Message, Sequence[m.Buffer]]]) -> None:
        self.replies += replies
        for peer, reply, _ in replies:
            if isinstance(reply, m.Grant):
                self.leases.setdefault(peer, []).extend(reply.leases)

    def actor(self, name: str = "a", session: str = "s") -> bytes:
        peer = f"{name}/{session}".encode()
        (welcome,) = [r for r in self.say(peer, hello("actor", name, session)) if isinstance(r, m.Welcome)]
        self.epochs[peer] = welcome.epoch
        return peer

    def learner(self, step: int = 0, session: str = "l") -> m.Welcome:
        history = self.ledger.state.histories[step]
        (welcome,) = [r for r in self.say(b"learner", hello("learner", "learner", session, step, history))
                      if isinstance(r, m.Welcome)]  # fmt: skip
        return welcome

    def publish(self, step: int) -> WeightUpdate:
        state = self.ledger.state
        made = synthetic.update(
            state.next_serial, step=step, incarnation=state.incarnation, fork_step=state.fork_step
        )
        assert not [r for r in self.say(b"learner", m.Publish(update=made)) if isinstance(r, m.Refused)]
        return made

    def want(self, peer: bytes, train: int, evaluate: int = 0) -> list[Lease]:
        """Ask for leases; everything granted so far has arrived."""
        granted = self.ledger._peers[peer].granted
        before = len(self.leases.get(peer, []))
        self.say(peer, m.Want(train=train, evaluate=evaluate, received_train=granted[0],
                              received_evaluate=granted[1]))  # fmt: skip
        return self.leases.get(peer, [])[before:]

    def made(self, peer: bytes, lease: Lease, serial: int, *, reward: float | None = None) -> Trajectory:
        """Return an answer to a lease: all alike, or with this reward, a success if it is positive."""
        self.seq += 1
        identity = TrajectoryId(
            run="run", actor=peer.decode().split("/")[0], epoch=self.epochs[peer], seq=self.seq
        )
        answer = dataclasses.replace(synthetic.answer_to(lease, serial=serial, tokens=8), identity=identity)
        if reward is None:
            return answer
        score = Score(name="answer", kind=ScoreKind.OUTCOME, weight=1.0, value=1.0 if reward > 0 else -1.0)
        return dataclasses.replace(answer, scores=(score,), turn_rewards=np.array([reward, 0.0], np.float32))

    def deliver(self, peer: bytes, trajectory: Trajectory) -> None:
        replies = self.say(peer, m.Deliver(seq=trajectory.identity.seq), [encode_trajectory(trajectory)])
        assert trajectory.identity.seq in [seq for r in replies if isinstance(r, m.Ack) for seq in r.seqs]

    def pull(self, step: int) -> list[Trajectory] | None:
        before = len(self.replies)
        self.say(b"learner", m.Pull(step=step))
        for _, reply, records in self.replies[before:]:
            if isinstance(reply, m.Batch):
                return [decode_trajectory(record) for record in records]
        return None


def ready(rig: Rig) -> tuple[bytes, WeightUpdate]:
    """Return a proven actor and the first weights."""
    rig.learner()
    announced = rig.publish(0)
    peer = rig.actor()
    assert rig.say(peer, m.Proof(proof=synthetic.proof(announced))) == []
    return peer, announced


def facts(state: LedgerState) -> dict[str, object]:
    """Everything durable of a state."""
    known = {key: value for key, value in vars(state).items() if key not in {"_config", "versions", "seen"}}
    return known | {"versions": vars(state.versions), "seen": sorted(state.seen.intervals())}


class Interleavings(RuleBasedStateMachine):
    """Actors, a learner and a hub that crash and talk in any order."""

    config = CONFIG

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.rig = Rig(Path(self.folder.name), self.config)
        self.rig.learner()
        self.lives = 0
        self.trained: dict[int, list[TrajectoryId]] = {}
        self.peers = {"a": self.rig.actor("a"), "b": self.rig.actor("b")}
        self.sent: list[tuple[bytes, Trajectory]] = []
        self.publish()

    @rule()
    def publish(self) -> None:
        step = self.rig.ledger.state.steps
        newest = self.rig.ledger.state.newest
        if newest is None or newest.version.step < step:
            announced = self.rig.publish(step)
            for peer in self.peers.values():
                self.rig.say(peer, m.Proof(proof=synthetic.proof(announced)))

    @rule(name=st.sampled_from("ab"), train=st.integers(0, 6), evaluate=st.integers(0, 2))
    def want(self, name: str, train: int, evaluate: int) -> None:
        self.rig.want(self.peers[name], train, evaluate)

    @rule(
        name=st.sampled_from("ab"),
        pick=st.integers(0, 20),
        fate=st.sampled_from(["ok", "ok", "ok", "fail", "alien"]),
        reward=st.sampled_from([1.0, -1.0, -1.05]),
    )
    def deliver(self, name: str, pick: int, fate: str, reward: float) -> None:
        peer = self.peers[name]
        leases = self.rig.leases.get(peer, [])
        newest = self.rig.ledger.state.newest
        if not leases or newest is None:
            return
        lease, serial = leases[pick % len(leases)], newest.version.serial + (fate == "alien")
        made = self.rig.made(peer, lease, serial, reward=reward)
        if fate == "fail":
            made = dataclasses.replace(made, outcome=Outcome.INFRASTRUCTURE_FAILURE)
        self.sent.append((peer, made))
        self.rig.deliver(peer, made)

    @rule(name=st.sampled_from("ab"), rewards=st.lists(st.sampled_from([1.0, -1.0]), min_size=1, max_size=5))
    def deliver_all(self, name: str, rewards: list[float]) -> None:
        """Run whatever the gate lets in, so that batches come about; then the learner takes one."""
        peer, newest = self.peers[name], self.rig.ledger.state.newest
        if newest is None:
            return
        self.rig.want(peer, 8)
        leased = self.rig.ledger.state.training.leased.values()
        for number, lease in enumerate([lease for holder, lease in leased if holder == name]):
            reward = rewards[number % len(rewards)]
            made = self.rig.made(peer, lease, newest.version.serial, reward=reward)
            self.sent.append((peer, made))
            self.rig.deliver(peer, made)
        self.pull()
        self.publish()

    @rule(pick=st.integers(0, 50))
    def resend(self, pick: int) -> None:
        mine = [made for peer, made in self.sent if peer in self.peers.values()]
        if mine:
            made = mine[pick % len(mine)]
            before = self.rig.ledger.books()
            self.rig.deliver(self.peers[made.identity.actor], made)
            assert self.rig.ledger.books()["made"] == before["made"]

    @rule()
    def garbage(self) -> None:
        for _ in range(3):
            self.rig.say(self.peers["a"], m.Deliver(seq=0), [b"x"] * 9)

    @rule(kl=st.sampled_from([0.01, 0.5]), back=st.sampled_from([0, 0, 1, 2]))
    def report(self, kl: float, back: int) -> None:
        step = float(self.rig.ledger.state.steps - back)
        self.rig.say(b"learner", m.Report(about="train", metrics={"step": step, "kl/reference": kl}))

    @rule()
    def pull(self) -> None:
        self.rig.pull(self.rig.ledger.state.steps)

    @rule(seconds=st.sampled_from([1.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.rig.now += seconds
        for peer in self.peers.values():
            self.rig.say(peer, m.Ping())
        self.rig.take(self.rig.ledger.tick(self.rig.now))

    @rule(name=st.sampled_from("ab"))
    def replace_actor(self, name: str) -> None:
        self.lives += 1
        peer = self.peers[name] = self.rig.actor(name, f"life {self.lives}")
        newest = self.rig.ledger.state.newest
        if newest is not None:
            self.rig.say(peer, m.Proof(proof=synthetic.proof(newest)))

    @rule(back=st.integers(0, 3))
    def checkpoint(self, back: int) -> None:
        state = self.rig.ledger.state
        oldest = max(state.first_batch, state.steps - back)
        self.rig.say(b"learner", m.Checkpointed(step=state.steps, oldest=oldest))
        self.rig.log.shorten(state.oldest_position, retain_bytes=0)
        # A step that was told before is not told again, whatever has become of older checkpoints since.
        kept = state.first_batch
        self.trained = {number: batch for number, batch in self.trained.items() if number >= kept}

    @rule(back=st.integers(0, 3))
    def resume_learner(self, back: int) -> None:
        self.lives += 1
        step = max(self.rig.ledger.state.first_batch, self.rig.ledger.state.steps - back)
        self.rig.learner(step, f"life {self.lives}")
        self.trained = {number: batch for number, batch in self.trained.items() if number < step}
        self.publish()

    @rule()
    def restart_hub(self) -> None:
        before = facts(self.rig.ledger.state)
        assert facts(restored(self.config, snapshot(self.rig.ledger.state))) == before
        self.rig.restart()
        assert facts(self.rig.ledger.state) == before
        session = self.rig.ledger.state.learner_session
        self.rig.learner(self.rig.ledger.state.first_batch, session)
        for peer in self.peers.values():
            self.rig.actor(*peer.decode().split("/"))

    @invariant()
    def books_balance(self) -> None:
        self.rig.ledger.check_books()

    @invariant()
    def the_gate_holds(self) -> None:
        state = self.rig.ledger.state
        steps = max([state.version, *(v.version.step for v in state.updates.values())])
        bound = (self.config.max_slip + steps + 1) * self.config.batch.trajectories
        assert state.accepted + len(state.training) <= bound

    @invariant()
    def no_attempt_is_trained_twice(self) -> None:
        state = self.rig.ledger.state
        # A batch also comes long after its pull, when its last trajectory arrives.
        for _, reply, records in self.rig.replies:
            if isinstance(reply, m.Batch):
                batch = [decode_trajectory(record) for record in records]
                self.trained[reply.step] = [made.identity for made in batch]
                self.all_may_be_trained(reply, batch)
        self.rig.replies.clear()
        trained = [identity for step in sorted(self.trained) for identity in self.trained[step]]
        assert sorted(self.trained) == sorted(state.batches)
        attempts = [state.items[identity].received.attempt for identity in trained]
        assert len({(a.group, a.attempt) for a in attempts}) == len(trained)
        groups = {a.group for a in attempts}
        assert len(groups) == len(self.trained) * self.config.batch.groups
        assert len(trained) == sum(map(state.size_of, groups))

    def all_may_be_trained(self, reply: m.Batch, batch: Sequence[Trajectory]) -> None:
        """What was sampled on a branch given up comes into a batch only while it is young enough there."""
        table, now = VersionTable(reply.versions, reply.forks), self.rig.ledger.state.incarnation
        for made in batch:
            sampled = made.versions[made.versions >= 0]
            if all(table.is_given_up(now, int(serial)) for serial in sampled):
                assert table.slip_at(reply.step, now, sampled).min() <= self.config.max_slip

    def teardown(self) -> None:
        self.rig.log.close()
        self.folder.cleanup()
