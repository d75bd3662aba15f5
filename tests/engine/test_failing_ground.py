"""A task whose environment always fails: leased again, never a reward or in a batch, given up in the end."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream import messages as m
from slipstream import synthetic
from slipstream.audit import Audit, History, _judge
from slipstream.chat import Chat
from slipstream.config import BatchConfig, EnvironmentConfig, EvaluationConfig, HubConfig, RunConfig
from slipstream.environments import EnvironmentFactory, environment_factory
from slipstream.environments.research import ResearchEnvironment, ResearchOptions, ResearchTasks
from slipstream.episodes import EpisodeRunner
from slipstream.errors import InfrastructureError
from slipstream.ingest import IngestLog, read_events
from slipstream.interfaces import Observation
from slipstream.ledger import Ledger
from slipstream.ledger_snapshot import restored, snapshot
from slipstream.retries import Backoff, Brake
from slipstream.tools.hermes import format_call
from slipstream.types import (
    Completion,
    Int32Array,
    Lease,
    Outcome,
    Sampling,
    Task,
    TaskAttempt,
    Trajectory,
    TrajectoryId,
)
from slipstream.wire import decode_trajectory, encode_trajectory, schema_hash

CONFIG = RunConfig(
    max_slip=2,
    batch=BatchConfig(groups=2, group_size=2),
    evaluation=EvaluationConfig(every=1000, tasks=2),
    environment=EnvironmentConfig(retries=1, backoff_s=0.0),
)
BAD_TASK = 1


class Failing(ResearchEnvironment):
    """Fails for one task, for ever."""

    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        if task.index == BAD_TASK:
            raise InfrastructureError("the database of this task is gone")
        return await super().reset(task, attempt)


class Hub:
    """A real ledger on a real log, with one learner and one actor."""

    def __init__(self, folder: Path, config: RunConfig = CONFIG) -> None:
        self.log = IngestLog(folder)
        self.ledger = Ledger(config, "run", self.log, lambda _: "")
        self.seq, self.granted, self.granted_heldout, self.step = 0, 0, 0, 0
        self.evaluated: list[m.Evaluated] = []
        self.leases: list[Lease] = []
        self.batches: dict[int, list[Trajectory]] = {}
        for peer, role in ((b"l", "learner"), (b"a", "actor")):
            self.say(peer, m.Hello(role=role, name=role, run="run", protocol=m.PROTOCOL,
                                   schema=schema_hash(), session=role))  # fmt: skip
        self.publish()

    def say(self, peer: bytes, message: m.Message, frames: Any = ()) -> None:
        replies = self.ledger.handle(peer, message, frames, 0.0) + self.ledger.progress(0.0)
        self.ledger.flush()
        for _, reply, records in replies:
            assert not isinstance(reply, m.Refused), reply
            if isinstance(reply, m.Grant):
                self.leases += reply.leases
                self.granted += sum(lease.evaluation < 0 for lease in reply.leases)
                self.granted_heldout += sum(lease.evaluation >= 0 for lease in reply.leases)
            if isinstance(reply, m.Evaluated):
                self.evaluated.append(reply)
            if isinstance(reply, m.Batch):
                self.batches[reply.step] = [decode_trajectory(record) for record in records]

    def publish(self) -> None:
        self.announced = synthetic.update(self.ledger.state.next_serial, step=self.step)
        self.say(b"l", m.Publish(update=self.announced))
        self.say(b"a", m.Proof(proof=synthetic.proof(self.announced)))

    def lease(self, places: int, evaluate: int = 0) -> list[Lease]:
        self.leases = []
        self.say(
            b"a",
            m.Want(
                train=places,
                evaluate=evaluate,
                received_train=self.granted,
                received_evaluate=self.granted_heldout,
            ),
        )
        return self.leases

    def deliver(self, trajectory: Trajectory) -> None:
        self.seq += 1
        identity = TrajectoryId(run="run", actor="actor", epoch=0, seq=self.seq)
        record = encode_trajectory(trajectory, identity)
        self.say(b"a", m.Deliver(seq=self.seq), [record])

    def train(self) -> None:
        self.say(b"l", m.Pull(step=self.step))
        if self.step in self.batches:
            self.step += 1
            self.publish()


def test_a_task_that_always_fails_costs_itself_and_nothing_else(tmp_path: Path, chat: Chat) -> None:
    hub, tasks = Hub(tmp_path), ResearchTasks(ResearchOptions())
    factory: EnvironmentFactory = dataclasses.replace(
        environment_factory(CONFIG.environment, CONFIG.rewards),
        make=lambda: Failing(tasks, CONFIG.environment, CONFIG.rewards),
    )
    runner = EpisodeRunner(factory=factory, chat=chat, environment=CONFIG.environment, rewards=CONFIG.rewards)
    brake = Brake(Backoff(first_s=1.0, longest_s=64.0, uniform=lambda low, high: high))
    issues: list[int] = []
    waits: list[float] = []
    failures = 0

    async def speak(tokens: Int32Array, observation: str) -> Completion:
        said = chat.message(format_call("answer", {"text": "Oslo"}))
        blank = np.full(len(said), -0.5, np.float32)
        serials = np.full(len(said), hub.announced.version.serial, np.int32)
        return Completion(token_ids=said, logprobs=blank, versions=serials, stopped=True)

    for _ in range(12):
        for lease in hub.lease(4):
            made = asyncio.run(runner.run(lease, speak, Sampling()))
            failed = made.outcome is Outcome.INFRASTRUCTURE_FAILURE
            assert failed == (lease.attempt.task == BAD_TASK)
            wait_s = brake.wait_s(lease.attempt.task, lease.issue, made.note if failed else "")
            if failed:
                failures += 1
                assert made.scores == () and not made.turn_rewards.any()
                assert made.note == "reset: the database of this task is gone"
                if lease.attempt.attempt == 0:
                    issues.append(lease.issue)
                    waits.append(wait_s)
            hub.deliver(made)
        hub.train()
        hub.ledger.check_books()

    # Leased again each time, under a new issue, ever more slowly.
    assert issues == list(range(len(issues))) and len(issues) >= 4
    assert waits == sorted(waits) and waits[-1] >= 8.0
    trained = [t for batch in hub.batches.values() for t in batch]
    assert trained and all(t.attempt.task != BAD_TASK and t.outcome is Outcome.COMPLETED for t in trained)
    books = hub.ledger.books()
    assert books["failed_infrastructure"] == failures
    assert books["made"] == hub.seq == failures + books["trained"] + books["buffered"]
    hub.log.close()


def give_up_after(failures: int, **evaluation: int) -> RunConfig:
    changes = {"hub": HubConfig(give_up_after=failures)}
    if evaluation:
        changes["evaluation"] = EvaluationConfig(**evaluation)
    return CONFIG.model_copy(update=changes)


def answered(hub: Hub, lease: Lease, *, fails: bool) -> None:
    made = synthetic.answer_to(lease, serial=max(lease.evaluation, hub.announced.version.serial))
    outcome = Outcome.INFRASTRUCTURE_FAILURE if fails else Outcome.COMPLETED
    hub.deliver(dataclasses.replace(made, outcome=outcome))


def test_a_task_that_fails_while_others_succeed_is_given_up_with_its_group(tmp_path: Path) -> None:
    """Otherwise it holds its places of the gate for ever, and enough of its kind would stop the run."""
    hub = Hub(tmp_path, give_up_after(3))
    failures = Counter[int]()
    for _ in range(12):
        for lease in hub.lease(4):
            fails = lease.attempt.task == BAD_TASK and lease.attempt.attempt == 0
            failures.update([lease.attempt.task] * fails)
            answered(hub, lease, fails=fails)
        hub.train()
        hub.ledger.check_books()
    books = hub.ledger.books()
    assert failures == {BAD_TASK: 3}
    assert books["given_up"] == 1, "its other attempt had its result"
    assert BAD_TASK not in hub.ledger.state.groups
    assert books["waiting"] == books["leased"] == 0
    assert hub.step == 11, "after the first round all places go to other tasks"
    trained = [t.attempt.task for batch in hub.batches.values() for t in batch]
    assert sorted(set(trained)) == [0, *range(BAD_TASK + 1, 2 * hub.step + 1)]
    hub.log.close()
    again = Ledger(give_up_after(3), "run", IngestLog(tmp_path), lambda _: "")
    assert again.books() == books
    assert snapshot(restored(CONFIG, snapshot(again.state))) == snapshot(hub.ledger.state)
    history = History()
    for entry in read_events(tmp_path):
        history.take(entry.event)
    assert _judge(history, {}) == Audit(lost=0, doubled=0, findings=())


def test_an_outage_gives_nothing_up(tmp_path: Path) -> None:
    """Whatever fails while nothing succeeds is tried until it does, and no task is skipped."""
    hub = Hub(tmp_path, give_up_after(3))
    for _ in range(20):
        for lease in hub.lease(4):
            answered(hub, lease, fails=True)
    for _ in range(2):
        for lease in hub.lease(4):
            answered(hub, lease, fails=False)
        hub.train()
    books = hub.ledger.books()
    assert books["failed_infrastructure"] == 80 and books["given_up"] == 0
    assert [t.attempt.task for t in hub.batches[0]] == [0, 0, 1, 1]


@pytest.mark.parametrize(("tasks", "broken", "count"), [(20, 2, 18), (20, 3, None), (9, 1, None)])
def test_an_evaluation_ends_without_a_tenth_of_its_tasks(
    tmp_path: Path, tasks: int, broken: int, count: int | None
) -> None:
    """More missing ones would make it another evaluation: it waits, and its deadline says so."""
    hub = Hub(tmp_path, give_up_after(3, every=1, tasks=tasks))
    for _ in range(8):
        for lease in hub.lease(0, evaluate=tasks):
            answered(hub, lease, fails=lease.attempt.task < broken)
    assert [done.count for done in hub.evaluated] == ([] if count is None else [count])
    assert len(hub.ledger.state.heldout) == (0 if count is not None else broken - tasks // 10)
    hub.ledger.check_books()
    hub.log.close()
