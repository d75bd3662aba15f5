"""A whole run in one thread under simulated time: the real Ledger and both real cores, seeded faults between.

One hub, several actors, one learner. Everything that happens is an event in a heap; randomness comes from one
generator, so a seed and a schedule of faults give the same run each time: `replay(seed)`.

A step is one delivered message, timer, episode or fault. Between any two effects of a role (append, flush,
send, sync, checkpoint, announce) it may crash.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import json
import random
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "engine"), str(HERE.parent.parent / "kernels")]

from simulated import (  # noqa: E402
    RUN,
    CheapWire,
    MemoryJournal,
    MemorySpool,
    Oracle,
    RealWire,
    Violation,
    Wire,
    progress_of,
    seconds_of,
)

from slipstream import ledger, synthetic  # noqa: E402
from slipstream import messages as m  # noqa: E402
from slipstream.config import (  # noqa: E402
    BatchConfig,
    CurriculumConfig,
    EvaluationConfig,
    HubConfig,
    RunConfig,
    StageConfig,
)
from slipstream.config_curriculum import DynamicConfig, ExplorationConfig  # noqa: E402
from slipstream.deadlines import Deadlines  # noqa: E402
from slipstream.errors import DeadlineError, RefusedError, SlipstreamError  # noqa: E402
from slipstream.history import START, extend  # noqa: E402
from slipstream.ledger_snapshot import snapshot  # noqa: E402
from slipstream.transport.actor_core import ActorCore  # noqa: E402
from slipstream.transport.core import PeerCore  # noqa: E402
from slipstream.transport.learner_core import LearnerCore  # noqa: E402
from slipstream.transport.zeromq import merge_acks  # noqa: E402
from slipstream.types import Lease, Outcome, TrajectoryId, Version, WeightUpdate  # noqa: E402

REAL, CHEAP = RealWire(), CheapWire()
LIMITS: Final = Deadlines(
    connect_s=60.0, credit_s=60.0, batch_s=240.0, drain_s=60.0, ping_s=2.0, silence_s=20.0
)
CALM_S: Final = 600.0
"""Simulated seconds from the last fault by which a run must have ended."""
QUIET_S: Final = 30.0
"""Simulated seconds from the last fault after which no wait may begin that runs out."""
KINDS: Final = (
    "hub", "hub", "actor", "actor", "learner", "cut", "cut", "cut", "flip_up", "flip_up", "flip_down",
    "stall", "last_word", "clone", "full", "old_checkpoint", "stray_learner",
)  # fmt: skip
CURRICULUM: Final = CurriculumConfig(
    enabled=True,
    stages=(StageConfig(advance=0.5, least_episodes=8), StageConfig(advance=0.7, least_episodes=8)),
    retreat=0.2,
    memory=16,
    dynamic=DynamicConfig(refills=1.0),
    exploration=ExplorationConfig(
        most_temperature=1.3, notch=0.1, alike_high=0.3, alike_low=0.1, least_group_size=2
    ),
)
_NO_GROUP: Final = 10**6
_SEEDS_APART: Final = 10**7
_MOST_FAILURES: Final = 5
WHERE: Final = ("handled", "half flushed", "flushed", "half sent", "sent")
"""Effects of the hub after which it can be killed."""


class Fault(NamedTuple):
    """Something that goes wrong at a step."""

    step: int
    kind: str
    target: int
    point: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The size of a run."""

    steps: int = 6
    actors: int = 3
    concurrency: int = 4
    group_size: int = 2
    groups: int = 2
    faults: int = 6
    curriculum: bool = False

    def config(self) -> RunConfig:
        """Return the run's configuration."""
        made = RunConfig(
            steps=self.steps,
            max_slip=1,
            batch=BatchConfig(groups=self.groups, group_size=self.group_size),
            evaluation=EvaluationConfig(every=2, tasks=2),
            curriculum=CURRICULUM if self.curriculum else CurriculumConfig(),
        )
        hub = HubConfig.model_construct(
            **{**made.hub.model_dump(), "credit_bytes": 1500, "lease_timeout_s": 30.0}
        )
        return made.model_copy(update={"hub": hub})


@dataclass(slots=True, eq=False)
class Link:
    """One connection of a client; order holds within it and nowhere else."""

    peer: bytes
    owner: Client
    alive: bool = True
    up_at: float = 0.0
    down_at: float = 0.0
    sent: int = 0
    survives: int = 1 << 60
    """Messages up to this one still arrive after the cut."""


@dataclass(slots=True, eq=False)
class Client:
    """A client's process: its core and its connection."""

    name: str
    session: str
    core: Any
    link: Link | None = None
    alive: bool = True
    stalled_until: float = 0.0
    wakes_at: float = float("inf")
    inbox: deque[tuple[m.Message, Sequence[m.Buffer]]] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class ActorProcess(Client):
    """An actor: episodes, weights, and trajectories that wait for room in the spool."""

    spool: Any = None
    free: list[int] = field(default_factory=lambda: [0, 0])
    serial: int = -1
    proven: set[int] = field(default_factory=set)
    finished: deque[Any] = field(default_factory=deque)
    stopping: bool = False
    clone: bool = False
    began: float = 0.0


@dataclass(slots=True, eq=False)
class LearnerProcess(Client):
    """A learner: its line of batches, and its checkpoints."""

    line: list[list[Any]] = field(default_factory=list)
    incarnation: int = -1
    fork_step: int = 0
    next_serial: int = 0
    evaluated: set[int] = field(default_factory=set)
    finishing: bool = False
    busy: bool = False
    stray: bool = False


class Simulator:
    """One run.

    Example: ``Simulator(7).run()``; raises Violation.
    """

    def __init__(
        self, seed: int, plan: Plan | None = None, schedule: Sequence[Fault] | None = None,
        wire: Wire | None = None,
    ) -> None:  # fmt: skip
        self.wire = wire or wire_of(seed)
        self.seed, self.plan = seed, plan or plan_of(seed)
        self.chance = random.Random(seed)
        self.config = _config(self.plan)
        self.oracle = Oracle(self.config, self.wire)
        self.schedule = deque(schedule_of(seed, self.plan) if schedule is None else sorted(schedule))
        self.now, self.steps, self.calm_at = 0.0, 0, 0.0
        self.counts: dict[str, int] = {}
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._ticket = 0
        self._sessions = 0
        self._links: dict[bytes, Link] = {}
        self.journal = MemoryJournal(self.oracle)
        self.hub: ledger.Ledger | None = None
        self._hub_life, self._hub_stalled, self._turn_due = 0, 0.0, False
        self._hub_inbox: deque[tuple[Link, m.Message, Sequence[m.Buffer]]] = deque()
        self._kill_hub_at = ""
        self.checkpoints: list[tuple[int, list[list[Any]]]] = [(0, [])]
        self.last_serial = -1
        self.learner: LearnerProcess | None = None
        self.actors: list[ActorProcess | None] = [None] * self.plan.actors
        self._done: set[int] = set()
        """Actors that have ended, told to stop."""
        self._called_at = -1.0
        self.clones: list[ActorProcess] = []
        self.strays: list[LearnerProcess] = []
        self.spools = [MemorySpool(self.oracle) for _ in range(self.plan.actors)]
        self.finished = False
        self._flip_up = self._flip_down = 0
        self._flipped_up: Counter[tuple[str, bytes]] = Counter()

    # ---------------------------------------------------------------- the loop

    def run(self) -> Simulator:
        """Run to the end; raises Violation when a promise is broken, or the run does not end."""
        with self.wire.open():
            try:
                self._run()
            except Violation as violation:
                violation.add_note(f"seed {self.seed}: replay({self.seed}) gives it again")
                raise
        return self

    def _run(self) -> None:
        self._start_hub()
        self._start_learner()
        for index in range(self.plan.actors):
            self._start_actor(index)
        heap, schedule = self._heap, self.schedule
        while not self._ended():
            if not heap:
                raise Violation("nothing is left to happen, and the run has not ended")
            self.now, _, act, arguments = heapq.heappop(heap)
            act(*arguments)
            if schedule and schedule[0].step <= self.steps:
                self._strike(schedule.popleft())
                self.calm_at = max(self.calm_at, self.now)
            elif self.now > self.calm_at + CALM_S and (self.finished or not schedule):
                raise Violation(
                    f"the run has not ended {CALM_S:g} s after its last fault: {self._describe()}"
                )
        self._check_end()

    def _ended(self) -> bool:
        # Faults that the run was too short for stay away.
        return self.finished and not any(self.actors)

    def _at(self, delay: float, act: Callable[..., None], *arguments: Any) -> None:
        self._ticket += 1
        heapq.heappush(self._heap, (self.now + delay, self._ticket, act, arguments))

    def _check_end(self) -> None:
        hub = self.hub
        if hub is None:
            self._start_hub()
            hub = self.hub
        assert hub is not None
        hub.check_books()
        state, living = hub.state, self.journal.trained()
        line = {step: tuple(x.identity for x in batch) for step, batch in enumerate(self.final_line)}
        if line != living:
            raise Violation(f"the learner trained on {line}, the log says {living}")
        trained = {x.attempt.group for batch in self.final_line for x in batch}
        filtered = set[int]().union(*self.oracle.replaced.values())
        if trained & filtered:
            raise Violation(f"groups {trained & filtered} were filtered and trained")
        everything = set(range(state.next_group)) - filtered
        # Whatever takes long is trained as surely as what is quick: only the newest groups may be missing.
        if len(everything - trained) > (self.config.max_slip + 1) * self.config.batch.groups:
            raise Violation(f"of groups {everything} only {trained} were trained")
        if trained & set(state.groups) or trained | set(state.groups) != everything:
            raise Violation(f"of groups {everything}: trained {trained}, open {set(state.groups)}")
        told = progress_of(self.config, self.journal._entries)
        if self.config.curriculum.enabled and state.course.now != told:
            raise Violation(f"the hub's curriculum is at {state.course.now}, its log says {told}")
        for index, spool in enumerate(self.spools):
            if len(spool):
                raise Violation(f"actor {index} ended with {len(spool)} trajectories in its spool")

    def _describe(self) -> str:
        hub = self.hub
        status = None if hub is None else hub.status(self.now)
        who = [
            None if a is None else (a.free, a.serial, len(a.finished), list(a.core.waits))
            for a in self.actors
        ]
        learner = self.learner and (len(self.learner.line), list(self.learner.core.waits))
        return f"hub {status}, actors {who}, learner {learner}"

    # ---------------------------------------------------------------- the hub

    def _start_hub(self) -> None:
        self._hub_life += 1
        self.hub = hub = ledger.Ledger(self.config, RUN, self.journal, lambda _: "quarantined")
        self.journal.opening = lambda: snapshot(hub.state)
        self.hub.check_books()
        self._turn_due = False
        self._at(1.0, self._hub_tick, self._hub_life)
        for link in list(self._links.values()):
            self._reconnect(link.owner)

    def _crash_hub(self) -> None:
        self._count("hub crashes")
        self.hub, self._kill_hub_at = None, ""
        self._hub_inbox.clear()
        self.journal.crash(self.chance)
        for link in self._links.values():
            link.alive, link.survives = False, -1
        self._at(self.chance.uniform(0.05, 3.0), self._start_hub)

    def _hub_tick(self, life: int) -> None:
        if life == self._hub_life and self.hub is not None:
            self.steps += 1
            self._hub_turn(life)
            self._at(1.0, self._hub_tick, life)

    def _arrive_up(self, link: Link, number: int, message: m.Message, frames: Sequence[m.Buffer]) -> None:
        if number <= link.survives and self.hub is not None:
            self._hub_inbox.append((link, message, frames))
            if not self._turn_due:
                self._turn_due = True
                self._at(0.001, self._hub_turn, self._hub_life)

    def _hub_turn(self, life: int) -> None:
        hub = self.hub
        if hub is None or life != self._hub_life:
            return
        if self.now < self._hub_stalled:
            self._at(self._hub_stalled - self.now, self._hub_turn, life)
            return
        self._turn_due = False
        replies = []
        while self._hub_inbox:
            link, message, frames = self._hub_inbox.popleft()
            self.steps += 1
            self.journal.speaker = link.owner.name, link.owner.session
            replies += hub.handle(link.peer, message, frames, self.now)
        replies += hub.progress(self.now)
        replies += hub.tick(self.now)
        if self._dies("handled"):
            return
        hub.flush()
        if self._dies("flushed"):
            return
        for peer, message, frames in merge_acks(replies):
            if self._kill_hub_at == "half sent" and self.chance.random() < 0.5:
                self._crash_hub()
                return
            if self._links[peer].alive:
                self._send_down(self._links[peer], message, frames)
            else:
                hub.lost(peer)
        self._dies("sent")

    def _dies(self, where: str) -> bool:
        if self._kill_hub_at != where:
            return False
        self._crash_hub()
        return True

    # ---------------------------------------------------------------- the network

    def _connect(self, client: Client) -> None:
        if self.hub is None or not client.alive or (client.link is not None and client.link.alive):
            return
        self._ticket += 1
        peer = f"{client.name}/{client.session}/{self._ticket}".encode()
        if client.link is not None:
            self._links.pop(client.link.peer, None) if client.link.survives < 0 else None
            if self.chance.random() < 0.5:  # A ping finds out too, later: both must do.
                client.core.remade(self.now)
        client.link = self._links[peer] = Link(peer=peer, owner=client)
        self._pump(client)

    def _reconnect(self, client: Client) -> None:
        self._at(self.chance.uniform(0.1, 1.0), self._connect, client)

    def _cut(self, link: Link) -> None:
        self._count("cuts")
        link.alive, link.survives = False, self.chance.randint(max(0, link.sent - 4), link.sent)
        self._reconnect(link.owner)

    def _send_up(self, link: Link, message: m.Message, frames: Sequence[m.Buffer]) -> None:
        if self._flip_up and frames and self._flipped_up[link.owner.name, bytes(frames[0])] < 2:
            self._flip_up -= 1
            # The hub takes a record that is damaged three times for one that is damaged where it lies.
            self._flipped_up[link.owner.name, bytes(frames[0])] += 1
            frames = [self._flipped(frames[0])]
        link.sent += 1
        link.up_at = max(link.up_at, self.now + self.chance.random() * 0.02)
        self._at(link.up_at - self.now, self._arrive_up, link, link.sent, message, frames)

    def _send_down(self, link: Link, message: m.Message, frames: Sequence[m.Buffer]) -> None:
        if self._flip_down and frames:
            self._flip_down -= 1
            frames = [self._flipped(frames[0]), *frames[1:]]
        link.down_at = max(link.down_at, self.now + self.chance.random() * 0.02)
        self._at(link.down_at - self.now, self._arrive_down, link, message, frames)

    def _flipped(self, record: m.Buffer) -> bytes:
        self._count("flips")
        damaged = bytearray(record)
        damaged[self.chance.randrange(len(damaged))] ^= 1 << self.chance.randrange(8)
        return bytes(damaged)

    def _arrive_down(self, link: Link, message: m.Message, frames: Sequence[m.Buffer]) -> None:
        client = link.owner
        if not link.alive or not client.alive:
            return
        if self.now < client.stalled_until:
            client.inbox.append((message, frames))
            return
        self._hear(client, message, frames)

    def _hear(self, client: Client, message: m.Message, frames: Sequence[m.Buffer]) -> None:
        self.steps += 1
        try:
            if isinstance(client, LearnerProcess):
                client.core.take(message, frames, self.now)
            else:
                client.core.take(message, self.now)
        except RefusedError:
            self._refused(client)
            return
        self._pump(client)

    def _wake(self, client: Client) -> None:
        client.wakes_at = float("inf")
        if not client.alive:
            return
        if self.now < client.stalled_until:
            self._at(client.stalled_until - self.now, self._wake, client)
            return
        self.steps += 1
        while client.inbox and client.alive:
            self._hear(client, *client.inbox.popleft())
        if not client.alive:
            return
        try:
            client.core.tick(self.now)
        except DeadlineError as error:
            self._count("deadlines")
            if client.core.waits.began_at > self.calm_at + QUIET_S:
                raise Violation(f"a wait ran out although nothing is wrong: {error}") from error
            self._end(client)
            return
        self._pump(client)

    def _pump(self, client: Client) -> None:
        """Do what a client's shell does after each turn."""
        core: PeerCore = client.core
        self._obey(client)
        while client.link is not None and client.link.alive and client.alive:
            outgoing = core.next_message(self.now)
            if outgoing is None:
                break
            self._send_up(client.link, *outgoing)
        if core.wakes_at < client.wakes_at and client.alive:
            client.wakes_at = core.wakes_at
            self._at(max(0.0, core.wakes_at - self.now), self._wake, client)

    def _obey(self, client: Client) -> None:
        if isinstance(client, ActorProcess):
            self._act(client)
        elif isinstance(client, LearnerProcess) and not client.stray:
            self._learn(client)

    # ---------------------------------------------------------------- actors

    def _session(self) -> str:
        self._sessions += 1
        return f"s{self._sessions}"

    def _start_actor(self, index: int, spool: MemorySpool | None = None) -> None:
        clone = spool is not None
        if spool is None:
            spool = self.spools[index]
        session, places = self._session(), self.plan.concurrency
        core = ActorCore(spool, RUN, f"a{index}", session=session, limits=LIMITS)
        actor = ActorProcess(name=f"a{index}", session=session, core=core, spool=spool, free=[places, places],
                             clone=clone, began=self.now)  # fmt: skip
        if clone:
            self.clones.append(actor)
        else:
            self.actors[index] = actor
        core.join(self.now)
        self._connect(actor)
        self._pump(actor)

    def _act(self, actor: ActorProcess) -> None:
        core: ActorCore = actor.core
        while core.events:
            match core.events.popleft():
                case m.Welcome(update=update) if update is not None:
                    self._at(self.chance.uniform(0.0, 0.2), self._load, actor, update)
                case m.Weights(update=update):
                    self._at(self.chance.uniform(0.0, 0.2), self._load, actor, update)
                case m.Grant(leases=leases, pinned=pinned):
                    if pinned is not None and pinned.version.serial not in actor.proven:
                        self._prove(actor, pinned)
                    for lease in leases:
                        actor.free[lease.evaluation >= 0] -= 1
                        seconds = seconds_of(lease.attempt.group, lease.attempt.attempt, lease.issue)
                        self._at(seconds, self._episode, actor, lease, actor.serial)
                case m.Stop():
                    actor.stopping = True
        self._deliver(actor)
        if actor.stopping and not actor.finished and core.drained(LIMITS.drain_s, self.now):
            if core._bytes_on_the_way:
                raise Violation(f"{actor.name}: {core._bytes_on_the_way} bytes of credit never came back")
            self._end(actor)

    def _load(self, actor: ActorProcess, update: WeightUpdate) -> None:
        if actor.alive and not actor.stopping and update.version.serial == actor.core.newest_serial:
            self.steps += 1
            actor.serial = update.version.serial
            self._prove(actor, update)
            self._want(actor)
            self._pump(actor)

    def _prove(self, actor: ActorProcess, update: WeightUpdate) -> None:
        actor.proven.add(update.version.serial)
        actor.core.prove(synthetic.proof(update))

    def _want(self, actor: ActorProcess) -> None:
        actor.core.want(max(0, actor.free[0]) if actor.serial >= 0 else 0, max(0, actor.free[1]))

    def _episode(self, actor: ActorProcess, lease: Lease, began: int) -> None:
        if not actor.alive or actor.stopping:
            return
        if self.now < actor.stalled_until:
            self._at(actor.stalled_until - self.now, self._episode, actor, lease, began)
            return
        self.steps += 1
        actor.free[lease.evaluation >= 0] += 1
        serials = {lease.evaluation} if lease.evaluation >= 0 else {began, actor.serial}
        if self.chance.random() < 0.03:
            serials.add(self.last_serial + self.chance.randint(0, 1))
        outcome = Outcome.INFRASTRUCTURE_FAILURE if self.chance.random() < 0.03 else Outcome.COMPLETED
        if self.chance.random() < 0.01:
            # Poison: an attempt that nobody leased.
            lease = replace(lease, attempt=replace(lease.attempt, group=_NO_GROUP))
        made = self.wire.answer(lease, serials, outcome)
        actor.finished.append(made)
        self._want(actor)
        self._pump(actor)

    def _deliver(self, actor: ActorProcess) -> None:
        core: ActorCore = actor.core
        while actor.finished and core.has_room(actor.finished[0], self.now):
            made = actor.finished.popleft()
            seq = core.append(made)
            identity = TrajectoryId(run=RUN, actor=actor.name, epoch=core.epoch, seq=seq)
            self.oracle.claims[identity] = self.wire.serials(made), actor.proven
            if made.attempt.group == _NO_GROUP:
                self.oracle.poison.add(identity)
            if self._kills_actor == (actor.name, "appended"):
                self._kills_actor = ("", "")
                self._crash_actor(actor)
                return
            core.durable(actor.spool.sync())

    _kills_actor = ("", "")

    def _crash_actor(self, actor: ActorProcess) -> None:
        self._count("actor crashes")
        actor.spool.crash(self.chance)
        self._end(actor)

    def _end(self, client: Client) -> None:
        """A process ends; its supervisor starts another, unless its work is done."""
        if not client.alive:
            return
        client.alive = False
        if client.link is not None and client.link.alive:
            client.link.alive, client.link.survives = False, self.chance.randint(0, client.link.sent)
        if isinstance(client, ActorProcess) and not client.clone:
            index = int(client.name[1:])
            if client.stopping and not len(client.spool) and client.began > self._called_at:
                self.actors[index] = None
                self._done.add(index)
            else:
                client.spool.crash(self.chance)
                self._at(self.chance.uniform(0.2, 2.0), self._start_actor, index)
        elif client is self.learner:
            self._at(self.chance.uniform(0.2, 2.0), self._start_learner_again)

    def _refused(self, client: Client) -> None:
        self._count("fenced")
        self._end(client)

    # ---------------------------------------------------------------- the learner

    def _start_learner(self) -> None:
        step, line = self.checkpoints[-1]
        core = LearnerCore(RUN, "learner", session=self._session(), limits=LIMITS)
        self.learner = LearnerProcess(name="learner", session=core._session, core=core, line=list(line))
        core.join(step, self.now, history_of(line))
        self._connect(self.learner)
        self._pump(self.learner)

    def _start_learner_again(self) -> None:
        """Start the learner and, as its supervisor does, actors that have ended and have work again.

        Without work the supervisor starts them too, and ends them with the learner.
        """
        self._start_learner()
        if self.checkpoints[-1][0] < self.config.steps:
            self._called_at = self.now
            while self._done:
                self._start_actor(self._done.pop())

    def _learn(self, learner: LearnerProcess) -> None:
        core: LearnerCore = learner.core
        if learner.incarnation < 0 and core.welcome is not None:
            learner.incarnation, learner.fork_step = core.welcome.epoch, core.welcome.fork_step
            learner.next_serial = max(core.welcome.next_serial, self.last_serial + 1)
            self._publish(learner)
            self._go_on(learner)
        while core.events:
            event = core.events.popleft()
            if isinstance(event, m.Evaluated):
                learner.evaluated.add(event.step)
                if not learner.busy:
                    self._go_on(learner)
            elif isinstance(event, m.Stop) and learner.finishing:
                self.final_line, self.finished = learner.line, True
                learner.alive = False
                return
        batch = core.take_batch()
        if batch is not None:
            if batch.history != history_of([*learner.line, list(batch.trajectories)]):
                raise Violation(f"batch {batch.step} belongs to another history than the learner's")
            self.oracle.trained(learner.line, list(batch.trajectories), learner.incarnation)
            learner.busy = True
            self._at(self.chance.uniform(0.0, 0.5), self._trained, learner, list(batch.trajectories))

    def _trained(self, learner: LearnerProcess, batch: list[Any]) -> None:
        # The supervisor sees to it that a stray learner writes no checkpoint beside another's.
        if not learner.alive or learner.stray:
            return
        if self.now < learner.stalled_until:
            self._at(learner.stalled_until - self.now, self._trained, learner, batch)
            return
        self.steps += 1
        learner.busy = False
        learner.line.append(batch)
        self._publish(learner)
        step = len(learner.line)
        if self.plan.curriculum:
            kl = 0.05 * (step % 7)
            learner.core.report("train", {"step": float(step), "kl/reference": kl})
        if step % 2 == 0 or step == self.config.steps:
            self.checkpoints.append((step, list(learner.line)))
            if self._kill_learner_unannounced:
                self._kill_learner_unannounced = False
                self._crash_learner()
                return
            self._oldest = self.checkpoints[-2][0]
            learner.core.checkpointed(step, oldest=self._oldest)
        self._go_on(learner)
        self._pump(learner)

    _kill_learner_unannounced = _kill_hub_at_the_end = False
    _oldest = 0

    def _go_on(self, learner: LearnerProcess) -> None:
        step, core = len(learner.line), learner.core
        if step < self.config.steps:
            core.pull(step, self.now)
        elif step in learner.evaluated and not learner.finishing:
            learner.finishing = True
            core.finish("done", self.now)
            if self._kill_hub_at_the_end and self.hub is not None:
                self._kill_hub_at_the_end = False
                self._kill_hub_at = "handled"

    def _publish(self, learner: LearnerProcess) -> None:
        serial, learner.next_serial = learner.next_serial, learner.next_serial + 1
        step = len(learner.line)
        checksum = 1000 * learner.incarnation + step
        version = Version(serial=serial, incarnation=learner.incarnation, step=step,
                          fork_step=learner.fork_step, checksum64=checksum)  # fmt: skip
        update = WeightUpdate(version=version, folder="", canary_tokens=(1, 2), canary_logprobs=(-0.5,))
        self.oracle.updates[serial] = update
        self.last_serial = max(self.last_serial, serial)
        learner.core.publish(update)

    def _crash_learner(self) -> None:
        learner = self.learner
        if learner is not None and learner.alive:
            self._count("learner crashes")
            self._end(learner)

    # ---------------------------------------------------------------- faults

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def _strike(self, fault: Fault) -> None:
        self.steps += 1
        self._count(fault.kind)
        index = fault.target % self.plan.actors
        actor = self.actors[index]
        match fault.kind:
            case "hub":
                if self.hub is not None:
                    self._kill_hub_at = WHERE[fault.point % len(WHERE)]
            case "actor" if fault.point % 2:
                self._kills_actor = (f"a{index}", "appended")
            case "actor" if actor is not None and actor.alive:
                self._crash_actor(actor)
            case "learner" if fault.point % 2:
                self._kill_learner_unannounced = True
            case "learner":
                self._crash_learner()
            case "old_checkpoint":
                # Never further back than what the hub has been told is kept.
                kept = len(self.checkpoints) > 1 and self.checkpoints[-2][0] >= self._oldest
                if kept and not self.finished:
                    self.checkpoints.pop()
                    self._crash_learner()
            case "cut":
                everybody = [
                    x for x in (self.learner, *self.actors, *self.clones) if x is not None and x.alive
                ]
                if everybody:
                    link = everybody[fault.target % len(everybody)].link
                    if link is not None and link.alive:
                        self._cut(link)
            case "flip_up":
                self._flip_up += 1 + fault.point % 4
            case "flip_down":
                self._flip_down += 1
            case "last_word":
                self._kill_hub_at_the_end = True
            case "stall":
                self._stall(fault)
            case "clone":
                if actor is not None and not self.finished:
                    self._start_actor(index, MemorySpool(self.oracle))
            case "full":
                self.spools[index].full = True
                self._at(fault.point + 0.5, self._room_again, index)
            case "stray_learner":
                self._stray(fault)

    def _room_again(self, index: int) -> None:
        self.spools[index].full = False
        self.calm_at = max(self.calm_at, self.now)
        actor = self.actors[index]
        if actor is not None and actor.alive:
            self._pump(actor)

    def _stall(self, fault: Fault) -> None:
        until = self.now + (1.0, 5.0, 25.0, 45.0)[fault.point % 4]
        self.calm_at = max(self.calm_at, until)
        everybody: list[Any] = [None, self.learner, *self.actors]
        who = everybody[fault.target % len(everybody)]
        if who is None:
            self._hub_stalled = until
        elif who.alive:
            who.stalled_until = until
            self._at(until - self.now, self._wake, who)

    def _stray(self, fault: Fault) -> None:
        """A learner stands still, is taken for dead, and comes back after another has taken its place."""
        learner = self.learner
        # One that has never joined cannot be told from a newer one: there the supervisor must see to it.
        if learner is None or not learner.alive or self.finished or learner.incarnation < 0:
            return
        learner.stray, learner.stalled_until = True, self.now + 3.0 + fault.point
        self.strays.append(learner)
        self.calm_at = max(self.calm_at, learner.stalled_until)
        self._at(3.0 + fault.point, self._wake, learner)
        if fault.target % 2 and learner.link is not None:
            self._cut(learner.link)
        self.learner = None
        self._at(0.5, self._start_learner_again)


def history_of(line: Sequence[Sequence[Any]]) -> str:
    """Return the history of a line of batches."""
    history = START
    for batch in line:
        history = extend(history, [trajectory.identity for trajectory in batch])
    return history


_CONFIGS: dict[Plan, RunConfig] = {}


def _config(plan: Plan) -> RunConfig:
    if plan not in _CONFIGS:
        _CONFIGS[plan] = plan.config()
    return _CONFIGS[plan]


def plan_of(seed: int) -> Plan:
    """Return the size of the run of a seed."""
    chance = random.Random(f"plan {seed}")
    return Plan(
        steps=chance.choice((4, 6, 12, 24)),
        actors=chance.choice((1, 2, 3)),
        concurrency=chance.choice((2, 4, 8)),
        group_size=chance.choice((2, 2, 4)),
        groups=chance.choice((1, 2, 3)),
        faults=chance.choice((0, 3, 8, 16)),
        curriculum=chance.choice((False, True)),
    )


def schedule_of(seed: int, plan: Plan) -> list[Fault]:
    """Return the faults of a seed."""
    chance = random.Random(f"faults {seed}")
    most = plan.steps * plan.groups * plan.group_size * 8
    return sorted(
        Fault(chance.randrange(most), chance.choice(KINDS), chance.randrange(12), chance.randrange(20))
        for _ in range(plan.faults)
    )


def wire_of(seed: int) -> Wire:
    """Return the wire of a seed: every sixteenth run has the product's own."""
    return REAL if seed % 16 == 0 else CHEAP


def replay(seed: int) -> Simulator:
    """Run a seed once more, exactly as before; raises Violation."""
    return Simulator(seed).run()


def shrink(seed: int) -> list[Fault]:
    """Return the fewest faults, leaving one out after the other, with which a seed's run still fails."""
    plan = plan_of(seed)
    kept = schedule_of(seed, plan)
    for fault in list(kept):
        fewer = [other for other in kept if other is not fault]
        try:
            Simulator(seed, plan, fewer).run()
        except (AssertionError, SlipstreamError):
            kept = fewer
    return kept


def search(first: int, steps: int) -> dict[str, Any]:
    """Run seed after seed until so many steps are done; return the figures, with the seeds that failed."""
    began, done, counts, failed = time.process_time(), 0, Counter[str](), list[dict[str, Any]]()
    gc.disable()  # Each run leaves cycles behind: they are collected many at a time.
    seed = first
    while done < steps and len(failed) < _MOST_FAILURES:
        simulator = Simulator(seed)
        try:
            simulator.run()
        except (AssertionError, SlipstreamError) as error:
            faults = [list(fault) for fault in shrink(seed)]
            failed.append({"seed": seed, "error": f"{type(error).__name__}: {error}", "faults": faults})
        done += simulator.steps
        counts.update(simulator.counts)
        seed += 1
        if seed % 64 == 0:
            gc.collect()
    gc.enable()
    seconds = time.process_time() - began
    return {"first": first, "runs": seed - first, "steps": done, "cpu_seconds": seconds,
            "steps_per_cpu_second": done / seconds, "events": dict(counts), "failed": failed}  # fmt: skip


def search_in_processes(first: int, steps: int, processes: int) -> dict[str, Any]:
    """Do what `search` does in several processes, each with seeds of its own; return the sums."""
    commands = [
        [
            sys.executable,
            __file__,
            "--seed",
            str(first + n * _SEEDS_APART),
            "--steps",
            str(steps // processes),
        ]
        for n in range(processes)
    ]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    parts = [json.loads(process.communicate()[0]) for process in running]
    counts = Counter[str]()
    for part in parts:
        counts.update(part["events"])
    total = {key: sum(part[key] for part in parts) for key in ("runs", "steps", "cpu_seconds")}
    return {"first": first, **total, "steps_per_cpu_second": total["steps"] / total["cpu_seconds"],
            "events": dict(counts), "failed": [one for part in parts for one in part["failed"]]}  # fmt: skip


def main() -> int:
    """Search, print the figures as one line of JSON, and return how many seeds failed."""
    parser = argparse.ArgumentParser(description="Simulate runs with faults.")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=1)
    chosen = parser.parse_args()
    if chosen.processes > 1:
        figures = search_in_processes(chosen.seed, chosen.steps, chosen.processes)
    else:
        figures = search(chosen.seed, chosen.steps)
    sys.stdout.write(json.dumps(figures) + "\n")
    return len(figures["failed"])


if __name__ == "__main__":
    sys.exit(main())
