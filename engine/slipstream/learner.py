"""Floor 5. The learner: pulls whole batches, moves the policy, publishes every version, keeps checkpoints.

wait            for                              released by
pull            a batch of the hub               its last trajectory, or DeadlineError
last events     the evaluation of the last step  its last episode, or DeadlineError
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from slipstream import checkpoint, tensor_file
from slipstream.best import FOLDER, Best, read_best
from slipstream.checkpoint_writer import CheckpointWriter, Published
from slipstream.config import RunConfig
from slipstream.deadlines import Deadline
from slipstream.errors import CheckpointError, ProtocolError, StorageError
from slipstream.flight_recorder import FLIGHT
from slipstream.history import START, extend
from slipstream.keys import client_keys
from slipstream.learner_rows import LearnerRows
from slipstream.messages import Buffer, Evaluated, Stop, Welcome
from slipstream.metrics import slip_statistics
from slipstream.model import (
    WEIGHTS,
    Policy,
    canary_logprobs,
    choose_device,
    load_model,
    load_policy,
    named_weights,
    random_state,
    restore_random_state,
    write_policy,
)
from slipstream.monitors import Monitor
from slipstream.policy_step import PolicyStep
from slipstream.rendezvous import await_hub, run_id
from slipstream.staleness import VersionTable
from slipstream.stop_signals import STOPPED, end_when_asked, note_when_asked
from slipstream.transport.client import LearnerClient, PulledBatch
from slipstream.transport.zeromq import SyncDealerChannel
from slipstream.types import Int32Array, Trajectory, Version, WeightUpdate
from slipstream.weights.filesystem import FilesystemPublisher
from slipstream_kernels import checksum64_named

NAME = "learner-0"
"""Who it is to the hub, and whose key it carries."""
CANARY_TOKENS = 16
OPTIMIZER = "optimizer.safetensors"
RANDOM = "random.safetensors"
STATE = "state.json"
LAST_EVALUATION_S = 600.0
_LOOK_S = 0.2

log = logging.getLogger(__name__)


def main(config: RunConfig, folder: Path) -> int:
    """Train a run to its last step and return 0; on SIGTERM or SIGINT save a checkpoint and return STOPPED.

    Raises AddressError without a hub to wait for, RefusedError, CheckpointError, NumericsError,
    DeadlineError.
    """
    end_when_asked()  # nothing is trained yet
    torch.set_num_threads(config.learner.threads)
    channel = _PartingChannel(await_hub(folder, NAME), client_keys(config.hub.keys, NAME))
    client = LearnerClient(channel, run_id(folder), NAME)
    learner = Learner(config, folder, client)
    learner.start()
    channel.parting = asked = note_when_asked()
    while not learner.done and not asked():
        learner.advance(timeout_s=0.5)
    if not learner.done:
        # The hub may be gone; whoever resumes says Hello with this step.
        learner.save_at_once()
    client.close()
    return 0 if learner.done else STOPPED


class _PartingChannel(SyncDealerChannel):
    """Lets a learner that was asked to stop not wait for a hub that does not answer.

    What it would have said then, whoever resumes from its checkpoint says.
    """

    parting: Callable[[], bool] = staticmethod(lambda: False)

    def send(self, frames: Sequence[Buffer], timeout_s: float) -> bool:
        """Hand one message over; returns False when no hub was connected in time."""
        end = time.monotonic() + timeout_s
        while not super().send(frames, max(0.0, min(_LOOK_S, end - time.monotonic()))):
            FLIGHT.beat()
            if self.parting():
                return True
            if time.monotonic() >= end:
                return False
        return True


class Learner:
    """The learner's state between two steps; `advance` is one turn of its loop."""

    def __init__(self, config: RunConfig, folder: Path, client: LearnerClient) -> None:
        """Load the newest verified checkpoint, or the warm start."""
        self._config, self._folder, self._client = config, folder, client
        self._checkpoints = folder / "checkpoints"
        device = choose_device(config.device)
        warm = self._checkpoints / "warmup"
        checkpoint.verify(warm)
        newest = self._newest()
        self._policy = load_policy(newest or warm, config=config.model, device=device)
        reference = None
        if config.objective.kl_coefficient > 0:
            reference = load_model(warm, dtype=config.model.dtype, device=device)
        self._step = PolicyStep(self._policy.model, reference, config, quarantine=folder / "quarantine")
        self._publisher = FilesystemPublisher(folder / "weights", keep=4)
        self._writer = CheckpointWriter(
            self._checkpoints, keep=config.checkpoint.keep, background=config.checkpoint.background
        )
        self._versions = VersionTable()
        self._monitor = Monitor(config.monitors)
        self.step, self._history = 0, START
        self.best = read_best(self._checkpoints)
        self._last_evaluated = -1
        self._rows = LearnerRows(folder, client.report)
        self._save_due = False
        self._last_wait: Deadline | None = None
        self.done = False
        """True after the last step, its evaluation, and the hub's word that all have been told."""
        # Before anything is restored: nothing may hang on how this process began.
        torch.manual_seed(config.seed)
        if newest is not None:
            self._restore(newest)

    def start(self) -> None:
        """Join the hub and publish the current weights as a new serial."""
        welcome = self._client.connect(self.step, self._history)
        self._incarnation, self._fork_step = welcome.epoch, welcome.fork_step
        self._publisher.pin_all()
        self._next_serial = max(welcome.next_serial, self._publisher.newest_serial() + 1)
        self._publish()
        self._rows.begin()

    def advance(self, *, timeout_s: float) -> None:
        """Hear what the hub has to say, then take one batch if it is there within `timeout_s`."""
        for event in self._client.events():
            self._hear(event)
        self._announce(self._writer.published())
        if self._save_due:
            self.save()
        if self.step >= self._config.steps:
            self._end(timeout_s)
            return
        began = time.monotonic()
        batch = self._client.pull(self.step, timeout_s)
        self._rows.starved(time.monotonic() - began)
        if batch is not None:
            self._take(batch)

    def save(self) -> None:
        """Begin a checkpoint of the current step; the hub is told once it is on disk, whole.

        Without room on the disk training goes on, and each step tries again.
        """
        self._announce(self._writer.settle())
        self._save_due = not self._write_checkpoint()
        if self._save_due:
            log.warning("step %d: the disk of %s has no room for a checkpoint; training goes on, and each "
                        "step tries again: free some space", self.step, self._checkpoints)  # fmt: skip

    def save_at_once(self) -> None:
        """Publish a checkpoint of the current step and return when it is on disk; the hub is not told.

        It may be gone; whoever resumes says Hello with this step. Raises StorageError without room.
        """
        self._writer.settle()
        self._write_or_raise()
        self._writer.settle()

    def _write_or_raise(self) -> None:
        if not self._write_checkpoint():
            raise StorageError(
                f"{self._checkpoints}: no room for the checkpoint of step {self.step}; free some space"
            )

    def _announce(self, done: Published | None) -> None:
        if done is not None:
            self._client.checkpointed(done.step, oldest=done.oldest)

    def _take(self, batch: PulledBatch) -> None:
        """Train on one batch, publish, report, and save when it is due."""
        self._history = self._continued(batch)
        for version in batch.versions:
            self._versions.add(version)
        for incarnation, step in batch.forks.items():
            self._versions.fork(incarnation, step)
        slips = [self._versions.slip_at(self.step, self._incarnation, t.versions) for t in batch.trajectories]
        FLIGHT.note(f"batch {self.step}: {len(batch.trajectories)} trajectories")
        result = self._step(batch.trajectories, slips, step=self.step)
        self.step += 1
        sync_began = time.monotonic()
        self._publish()
        row = {
            **result.metrics,
            **_slip_metrics(batch.trajectories, slips, self._config.max_slip),
            **self._watch(batch.trajectories),
            "skipped": float(self._step.optimizer.skipped),
            "trajectories": float(len(batch.trajectories)),
            "tokens/trained": float(result.tokens_trained),
            "sync/seconds": time.monotonic() - sync_began,
        }
        self._rows.report(self.step, row)
        if self.step % self._config.checkpoint.every == 0 or self.step == self._config.steps:
            self.save()

    def _watch(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Return what the monitors find in a batch, and say what is above its limit."""
        return self._warn(self._monitor.observe(trajectories), self.step)

    def _warn(self, found: dict[str, float], step: int) -> dict[str, float]:
        for sentence in self._monitor.alarms if found else ():
            log.warning("step %d: %s", step, sentence)
        return found

    def _continued(self, batch: PulledBatch) -> str:
        """Return what this learner is trained on with a batch; raises ProtocolError if the hub disagrees."""
        history = extend(self._history, [trajectory.identity for trajectory in batch.trajectories])
        if history != batch.history:
            raise ProtocolError(
                f"batch {batch.step}: expected one after which this learner's history is {history}, got one "
                f"that makes it {batch.history}: hub and learner have trained on different batches; restart "
                f"the learner"
            )
        return history

    def _publish(self) -> None:
        """Write the weights under the next serial and announce them with a canary."""
        weights = {name: tensor.cpu() for name, tensor in named_weights(self._policy.model).items()}
        serial, self._next_serial = self._next_serial, self._next_serial + 1
        folder = self._publisher.publish(weights, serial=serial)
        version = Version(
            serial=serial,
            incarnation=self._incarnation,
            step=self.step,
            fork_step=self._fork_step,
            checksum64=checksum64_named(weights),
        )
        self._versions.add(version)
        FLIGHT.note(f"serial {serial} published, step {self.step}")
        if self.step % self._config.evaluation.every == 0 or self.step == self._config.steps:
            # Its evaluation may begin late and its weights may turn out the best.
            self._publisher.pin(serial)
        canary = canary_tokens(self._policy)
        self._client.publish(
            WeightUpdate(
                version=version,
                folder=folder,
                canary_tokens=canary,
                canary_logprobs=canary_logprobs(self._policy.model, canary),
            )
        )

    def _hear(self, event: Evaluated | Stop | Welcome) -> None:
        match event:
            case Welcome():
                self._rows.say_again()
            case Evaluated():
                self._judge(event)
            case Stop(reason=reason):
                raise CheckpointError(f"the hub stopped the learner: {reason}; continue with --resume")

    def _judge(self, event: Evaluated) -> None:
        """Keep the evaluated version if it is the best so far, by held-out success."""
        self._last_evaluated = max(self._last_evaluated, event.step)
        better = event.success > self.best.success
        if not event.replayed or not self._rows.is_evaluated(event.step):
            self._client.report(
                "evaluation",
                {
                    "step": float(event.step),
                    "serial": float(event.serial),
                    "success": event.success,
                    "tasks": float(event.count),
                    "best": float(better),
                    **event.metrics,
                    **self.best.compared(event),
                    **self._generalization(event),
                },
            )
        source = self._publisher.folder / f"serial-{event.serial:08d}" / WEIGHTS
        if better and source.is_file():
            self.best = Best.of(event)
            tensors = checkpoint.read_tensors(source)
            checkpoint.publish(
                self._checkpoints / FOLDER,
                lambda folder: write_policy(folder, self._policy, tensors),
                asdict(self.best),
            )
        if event.replayed:
            # An older result may stand for newer weights: one between them may still be under way.
            self._publisher.unpin(event.serial)
        else:
            # Evaluations run in the order of their serials: nobody asks for an older one any more.
            self._publisher.unpin_up_to(event.serial)

    def _generalization(self, event: Evaluated) -> dict[str, float]:
        """Return how success in training compares with the evaluation, where the same task is posed."""
        staged = self._config.curriculum.enabled and self._config.curriculum.stages
        return {} if staged else self._warn(self._monitor.compare(event.success), event.step)

    def _end(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for the last evaluation and all rows; then end the run for everybody."""
        if self._last_wait is None:
            what = f"the held-out evaluation of step {self.step}"
            self._last_wait = Deadline(LAST_EVALUATION_S, "learner", what)
            FLIGHT.waits(f"{what} from the hub", LAST_EVALUATION_S)
        self._last_wait.check()
        for event in self._client.events(timeout_s):
            self._hear(event)
        if self._last_evaluated < self.step:
            return
        self._rows.look()
        if not (self._rows.are_written() and self._rows.is_evaluated(self.step)):
            return
        self._announce(self._writer.settle())
        self._write_or_raise()
        self._announce(self._writer.settle())
        self._client.finish("training is over")
        self.done = True

    def _write_checkpoint(self) -> bool:
        """Copy the state and begin to write it; return False when the disk has no room."""
        weights = {name: t.detach().cpu().clone() for name, t in named_weights(self._policy.model).items()}
        optimizer = {name: t.cpu() for name, t in self._step.optimizer.state_tensors().items()}
        random = random_state()
        state = {
            "step": self.step,
            "history": self._history,
            "guard": self._step.optimizer.guard_state(),
            "best": asdict(self.best),
            "monitors": self._monitor.state(),
            "rows": self._rows.state(),
        }

        def write(folder: Path) -> None:
            write_policy(folder, self._policy, weights)
            checkpoint.write_tensors(folder / OPTIMIZER, optimizer)
            checkpoint.write_tensors(folder / RANDOM, random)
            checkpoint.write_state(folder / STATE, state)

        size = sum(t.nbytes for tensors in (weights, optimizer, random) for t in tensors.values())
        return self._writer.save(self.step, write, size)

    def _newest(self) -> Path | None:
        if not any(self._checkpoints.glob("step-*")):
            return None
        return checkpoint.load_latest(self._checkpoints).path

    def _restore(self, folder: Path) -> None:
        state = checkpoint.read_state(folder / STATE)
        self._step.optimizer.load_state_tensors(checkpoint.read_tensors(folder / OPTIMIZER))
        self._step.optimizer.load_guard_state(state["guard"])
        restore_random_state(checkpoint.read_tensors(folder / RANDOM, dtypes=tensor_file.BYTES))
        self.step, self._history = int(state["step"]), str(state["history"])
        self._rows.restore(state["rows"])
        self._monitor.restore(state.get("monitors", {}))


def canary_tokens(policy: Policy) -> tuple[int, ...]:
    """Return a fixed token sequence spread over the vocabulary."""
    vocabulary = policy.model.config.vocab_size
    return tuple(int(i) for i in np.linspace(0, vocabulary - 1, CANARY_TOKENS))


def _slip_metrics(
    trajectories: Sequence[Trajectory], slips: Sequence[Int32Array], max_slip: int
) -> dict[str, float | list[float]]:
    """Return slip and age of trained tokens at consumption, and where the slip was gathered."""
    masks = [(t.loss_mask > 0) & (slip <= max_slip) for t, slip in zip(trajectories, slips, strict=True)]
    if not any(mask.any() for mask in masks):
        return {}
    slip_N = np.concatenate([slip[mask] for slip, mask in zip(slips, masks, strict=True)])
    # The newest token of a trajectory was sampled last: what came after is queueing.
    queue = [int(slip[mask].min()) if mask.any() else 0 for slip, mask in zip(slips, masks, strict=True)]
    queue_N = np.repeat(queue, [int(mask.sum()) for mask in masks])
    now = time.time()
    age_N = np.repeat([now - t.timings.finished_s for t in trajectories], [int(mask.sum()) for mask in masks])
    return {
        **slip_statistics(slip_N, age_N),
        "slip/in_queue_mean": float(queue_N.mean()),
        "slip/in_flight_mean": float((slip_N - queue_N).mean()),
    }
