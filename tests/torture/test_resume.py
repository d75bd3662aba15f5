"""A hundred resumes: no task skipped, none repeated, and long episodes lost no more often than short ones.

A kill hits whatever runs, and long episodes run longer: a system that forgets them trains on the short ones.
Here hub, actor and learner die together a hundred times at random moments, with episodes of very different
lengths under way, and go on from what is on disk. Time is counted, not waited for.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from slipstream import messages as m
from slipstream import synthetic
from slipstream.config import BatchConfig, EnvironmentConfig, EvaluationConfig, HubConfig, RunConfig
from slipstream.history import START, extend
from slipstream.ingest import IngestLog
from slipstream.ledger import Ledger
from slipstream.ledger_snapshot import snapshot
from slipstream.types import Lease, TrajectoryId
from slipstream.wire import decode_trajectory, encode_trajectory, schema_hash

CONFIG = RunConfig(
    steps=10_000,
    max_slip=2,
    batch=BatchConfig(groups=4, group_size=4),
    evaluation=EvaluationConfig(every=10_000, tasks=1),
    environment=EnvironmentConfig(timeout_s=100_000.0),
    hub=HubConfig(lease_timeout_s=200_000.0),
)
BATCHES = 400
CONCURRENCY = 24
CHECKPOINT_EVERY = 3


def length_of(task: int, attempt: int) -> int:
    """Ticks of an episode: most take a few, some take hundreds."""
    return 1 + int(math.exp(random.Random(f"{task}/{attempt}").gauss(1.5, 1.3)))


class Life:
    """One life of hub, actor and learner on the files of the lives before."""

    def __init__(
        self, folder: Path, checkpoint: tuple[int, str], spool: dict[int, bytes], number: int
    ) -> None:
        """Start all three; `checkpoint` is (step, history), `spool` the actor's unacknowledged records."""
        self.log = IngestLog(folder / "log", segment_bytes=1 << 20)
        self.ledger = Ledger(CONFIG, "run", self.log, lambda frames: "none")
        self.log.opening = lambda: snapshot(self.ledger.state)
        self.step, self.history = checkpoint
        self.checkpoint, self.spool = checkpoint, spool
        self.running: dict[Lease, int] = {}
        self.received = 0
        self.epoch = -1
        session = f"life {number}"
        self.say(b"learner", self.hello("learner", session, step=self.step, history=self.history))
        self.publish()
        self.say(b"actor", self.hello("actor", session))
        self.prove()
        self.next_seq = 0
        for seq, record in list(self.spool.items()):
            self.say(b"actor", m.Deliver(seq=seq), [record])
            self.next_seq = max(self.next_seq, seq + 1)

    def hello(self, role: str, session: str, *, step: int = 0, history: str = START) -> m.Hello:
        return m.Hello(role=role, name=role, run="run", protocol=m.PROTOCOL, schema=schema_hash(),
                       session=session, step=step, history=history)  # fmt: skip

    def say(self, peer: bytes, message: m.Message, frames: Sequence[m.Buffer] = ()) -> None:
        """Tell the hub something and do what it says."""
        replies = self.ledger.handle(peer, message, frames, 0.0) + self.ledger.progress(0.0)
        self.ledger.flush()
        for _, reply, records in replies:
            self.hear(reply, records)

    def hear(self, reply: m.Message, records: Sequence[m.Buffer]) -> None:
        match reply:
            case m.Welcome() if self.ledger.state.epochs:
                self.epoch = reply.epoch
            case m.Ack():
                for seq in reply.seqs:
                    self.spool.pop(seq, None)
            case m.Grant():
                self.received += len(reply.leases)
                for lease in reply.leases:
                    self.running[lease] = length_of(lease.attempt.task, lease.attempt.attempt)
            case m.Batch():
                identities = [decode_trajectory(record).identity for record in records]
                self.history = extend(self.history, identities)
                assert self.history == reply.history
                self.step += 1
            case m.Refused():
                raise AssertionError(reply.reason)

    def publish(self) -> None:
        state = self.ledger.state
        made = synthetic.update(state.next_serial, step=self.step, incarnation=state.incarnation,
                                fork_step=state.fork_step)  # fmt: skip
        self.say(b"learner", m.Publish(update=made))

    def prove(self) -> None:
        newest = self.ledger.state.newest
        assert newest is not None
        self.serial = newest.version.serial
        self.say(b"actor", m.Proof(proof=synthetic.proof(newest)))

    def tick(self) -> None:
        """Let every episode run on a little, deliver those that end, and train if a batch is whole."""
        before = self.step  # a batch comes with its last trajectory, or when it is asked for
        ended = [lease for lease, left in self.running.items() if left <= 1]
        self.running = {lease: left - 1 for lease, left in self.running.items() if left > 1}
        for lease in ended:
            seq, self.next_seq = self.next_seq, self.next_seq + 1
            identity = TrajectoryId(run="run", actor="actor", epoch=self.epoch, seq=seq)
            made = synthetic.answer_to(lease, serial=self.serial, tokens=8)
            self.spool[seq] = bytes(encode_trajectory(dataclasses.replace(made, identity=identity)))
            self.say(b"actor", m.Deliver(seq=seq), [self.spool[seq]])
        free = CONCURRENCY - len(self.running)
        self.say(b"actor", m.Want(train=free, evaluate=0, received_train=self.received, received_evaluate=0))
        self.say(b"learner", m.Pull(step=self.step))
        if self.step > before:
            self.publish()
            self.prove()
        if self.step % CHECKPOINT_EVERY == 0 and self.step > self.checkpoint[0]:
            oldest = self.checkpoint[0]
            self.checkpoint = (self.step, self.history)
            self.say(b"learner", m.Checkpointed(step=self.step, oldest=oldest))
            self.log.shorten(self.ledger.state.oldest_position, retain_bytes=0)

    def die(self) -> None:
        """Leave what is on disk."""
        self.log.close()


def trained_lengths(
    folder: Path, lives: int, seed: int
) -> tuple[list[int], Counter[tuple[int, int]], Ledger]:
    """Train BATCHES batches in so many lives; return lengths trained, each attempt's count, and the hub."""
    chance, lengths = random.Random(seed), dict[tuple[int, int], int]()
    trained: Counter[tuple[int, int]] = Counter()
    life = Life(folder, (0, START), {}, 0)
    by_step: dict[int, list[tuple[int, int]]] = {}
    for number in range(1, lives + 1):
        if number < lives:
            # Also before the first checkpoint of a life: it must not need one to get on.
            goal = min(life.step + chance.randint(1, 2 * BATCHES // lives + CHECKPOINT_EVERY), BATCHES - 1)
        else:
            goal = BATCHES
        while life.step < goal:
            life.tick()
            collect(life, by_step)
        life.ledger.check_books()
        if number < lives:
            life.die()
            by_step = {step: batch for step, batch in by_step.items() if step < life.checkpoint[0]}
            life = Life(folder, life.checkpoint, life.spool, number)
    for batch in by_step.values():
        trained.update(batch)
        lengths.update({attempt: length_of(*attempt) for attempt in batch})
    return list(lengths.values()), trained, life.ledger


def collect(life: Life, by_step: dict[int, list[tuple[int, int]]]) -> None:
    """Note the attempts of batches that are new."""
    state = life.ledger.state
    for step in range(max(state.first_batch, len(by_step)), state.steps):
        received = [state.items[identity].received.attempt for identity in state.batches[step]]
        by_step[step] = [(attempt.task, attempt.attempt) for attempt in received]


def ks_p_value(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the p-value of the two-sample Kolmogorov-Smirnov test, from its limit distribution.

    Source: Smirnov 1948; the sum is Q_KS of Press et al., Numerical Recipes, section 14.3.
    """
    points = sorted({*one, *other})
    ones, others = sorted(one), sorted(other)
    distance = max(abs(share_below(ones, x) - share_below(others, x)) for x in points)
    root = math.sqrt(len(ones) * len(others) / (len(ones) + len(others)))
    x = (root + 0.12 + 0.11 / root) * distance
    if x < 0.2:
        return 1.0
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * x * x) for k in range(1, 101)))


def share_below(values: Sequence[float], limit: float) -> float:
    """Return the share of sorted values that are at most `limit`."""
    return bisect.bisect_right(values, limit) / len(values)


def test_the_test_finds_a_bias() -> None:
    """Losing one episode in eight, the long ones rather than the short, is seen."""
    chance = random.Random(1)
    lengths = [length_of(task, attempt) for task in range(1600) for attempt in range(4)]
    careless = [length for length in lengths if chance.random() > length / 75]
    assert ks_p_value(lengths, lengths) > 0.9
    assert ks_p_value(careless, lengths) < 0.01


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_smoke_a_hundred_resumes_skip_no_task_and_repeat_none(tmp_path: Path, seed: int) -> None:
    lengths, trained, ledger = trained_lengths(tmp_path, 101, seed)
    state = ledger.state
    assert state.incarnation == 100
    assert set(trained.values()) == {1}, f"seed {seed}: an attempt was trained twice"
    assert len(trained) == BATCHES * CONFIG.batch.trajectories
    groups = {task for task, _ in trained}
    assert all((task, attempt) in trained for task in groups for attempt in range(CONFIG.batch.group_size))
    open_now = set(state.groups)
    assert groups | open_now == set(range(state.next_group)), f"seed {seed}: a task was skipped"
    assert not groups & open_now, f"seed {seed}: a trained task is owed again"
    every = [length_of(task, attempt) for task in range(state.next_group) for attempt in range(4)]
    p_value = ks_p_value(lengths, every)
    print(f"100 resumes: {len(trained)} trained, KS p = {p_value:.3f} against all tasks")
    assert p_value > 0.01
