"""Serial mode: equal results every time, also after a kill, and those of processes at slip 0."""

import json
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from books import Books, check_books, check_finished, read_books
from runs import Run, until
from safetensors.torch import load_file

from slipstream.metrics import read_rows, rows_of
from slipstream.types import Trajectory

pytestmark = pytest.mark.timeout(1800)
CLOCK = {"wall_seconds", "stage_seconds", "learner_starved_share"}


def summary(run: Run) -> dict[str, Any]:
    """What must not depend on the clock."""
    read = json.loads((run.folder / "summary.json").read_text())
    return {key: value for key, value in read.items() if key not in CLOCK}


def last_weights(run: Run) -> bytes:
    folder = run.folder / "checkpoints" / f"step-{run.config.steps:08d}"
    return (folder / "model.safetensors").read_bytes()


def assert_equal(one: Trajectory, other: Trajectory) -> None:
    """The same episode, bit for bit; serials and seconds are compared by whoever knows them."""
    for name in ("token_ids", "loss_mask", "turns", "turn_rewards"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.behavior_logprobs.tobytes() == other.behavior_logprobs.tobytes()
    assert list(one.scores) == list(other.scores)
    assert (one.outcome, one.attempt, one.split) == (other.outcome, other.attempt, other.split)


def assert_same_training(one: Books, other: Books) -> None:
    """The same attempts in the same steps, sampled by weights of the same step."""
    ours, theirs = one.by_attempt(), other.by_attempt()
    assert list(ours) == list(theirs)
    for attempt, trajectory in ours.items():
        assert_equal(trajectory, theirs[attempt])
        sampled = [
            [books.steps[int(serial)] for serial in found.versions if serial >= 0]
            for books, found in ((one, trajectory), (other, theirs[attempt]))
        ]
        assert sampled[0] == sampled[1]


def moved(run: Run) -> bool:
    """Whether training changed the weights: otherwise equal weights would prove nothing."""
    warm = run.folder / "checkpoints" / "warmup" / "model.safetensors"
    return warm.read_bytes() != last_weights(run)


def test_two_serial_runs_are_equal(new_run: Callable[..., Run]) -> None:
    runs = [new_run(name, "steps=3") for name in ("one", "two")]
    for train, run in [(run.start("--serial"), run) for run in runs]:
        ended = train.end()
        assert ended.code == 0, run.story(ended)
    assert summary(runs[0]) == summary(runs[1])
    books = [check_finished(run.folder, run.config) for run in runs]
    assert_same_training(*books)
    ours, theirs = (each.by_attempt() for each in books)
    assert all((ours[key].versions == theirs[key].versions).all() for key in ours)
    assert last_weights(runs[0]) == last_weights(runs[1])
    assert moved(runs[0])


@pytest.mark.slow
def test_a_serial_run_goes_on_after_a_kill_as_if_never_interrupted(new_run: Callable[..., Run]) -> None:
    whole, broken = new_run("whole"), new_run("broken", "environment.tool_latency_s=0.1")
    # The latency gives the signal time to arrive; it changes no trajectory.
    train = whole.start("--serial")
    process = broken.start("--serial")
    broken.reach(3, process)
    process.signal(signal.SIGKILL)
    assert process.end().code == -signal.SIGKILL
    check_books(read_books(broken.folder), broken.config)
    ended = train.end()
    assert ended.code == 0, whole.story(ended)
    ended = broken.resume("--serial").end()
    assert ended.code == 0, broken.story(ended)
    books = [check_finished(run.folder, run.config) for run in (whole, broken)]
    assert books[1].rollbacks
    assert_same_training(*books)
    assert last_weights(whole) == last_weights(broken)
    assert moved(whole)


CURRICULUM = (
    "curriculum.enabled=true",
    "curriculum.retreat=0.0",
    "curriculum.stages=[{environment={max_turns=4, tool_failure_rate=0.0}, advance=0.01, least_episodes=40}]",
    "curriculum.band.period=3",
    "curriculum.band.low=0.2",
    "curriculum.dynamic.refills=0.5",
    "curriculum.dynamic.alike=success",
    "curriculum.dynamic.weight=0.5",
    "curriculum.exploration.most_temperature=1.3",
    "curriculum.exploration.alike_high=0.0",
    "curriculum.exploration.alike_low=0.0",
    "curriculum.exploration.least_group_size=2",
)


@pytest.mark.slow
def test_a_curriculum_goes_on_after_a_kill_as_if_never_interrupted(new_run: Callable[..., Run]) -> None:
    """Two steps behind its last checkpoint: what was filtered, posed and warmed since comes out the same."""
    settings = (*CURRICULUM, "steps=8", "checkpoint.every=3")
    whole = new_run("whole", *settings)
    broken = new_run("broken", *settings, "environment.tool_latency_s=0.05")
    train = whole.start("--serial")
    process = broken.start("--serial")
    broken.reach(5, process)
    process.signal(signal.SIGKILL)
    assert process.end().code == -signal.SIGKILL
    ended = broken.resume("--serial").end()
    assert ended.code == 0, broken.story(ended)
    ended = train.end()
    assert ended.code == 0, whole.story(ended)
    books = [read_books(run.folder) for run in (whole, broken)]
    assert books[1].rollbacks
    assert_same_training(*books)
    assert_same_state(whole, broken)
    told = [
        [
            {key: value for key, value in row.items() if key.startswith("curriculum/")}
            for row in rows_of(read_rows(run.folder), "train")
        ]
        for run in (whole, broken)
    ]
    assert told[0] == told[1]
    assert summary(whole)["stages"] == summary(broken)["stages"]
    # It did something: groups were filtered, and later ones sampled warmer.
    assert "filtered" in books[0].dropped.values()
    assert {t.sampling.temperature for t in books[0].by_attempt().values()} > {1.0}
    assert moved(whole)


STATES = ("model.safetensors", "optimizer.safetensors", "random.safetensors")


def assert_same_state(one: Run, other: Run) -> None:
    """Weights, optimizer and generators after the last step, bit for bit; names what differs."""
    assert one.config.steps == other.config.steps
    folders = [run.folder / "checkpoints" / f"step-{run.config.steps:08d}" for run in (one, other)]
    for file in STATES:
        ours, theirs = (load_file(folder / file) for folder in folders)
        assert ours.keys() == theirs.keys()
        differ = {
            name: float((tensor.double() - theirs[name].double()).abs().max())
            for name, tensor in ours.items()
            if tensor.numpy().tobytes() != theirs[name].numpy().tobytes()
        }
        assert not differ, f"{file} of {folders}: {len(differ)} of {len(ours)} tensors differ, by {differ}"


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3])
def test_a_kill_at_every_step_leaves_no_trace(new_run: Callable[..., Run], every: int) -> None:
    """Killed once in each step, resumed each time: the same bits as a run that never stopped."""
    settings = ("steps=8", "optim.minibatches=2", f"checkpoint.every={every}")
    whole, broken = (
        new_run("whole", *settings),
        new_run("broken", *settings, "environment.tool_latency_s=0.05"),
    )
    train = whole.start("--serial")
    for step in range(1, whole.config.steps):
        process = broken.resume("--serial") if step > 1 else broken.start("--serial")
        broken.reach(step, process)
        process.signal(signal.SIGKILL)
        assert process.end().code == -signal.SIGKILL
    ended = broken.resume("--serial").end()
    assert ended.code == 0, broken.story(ended)
    ended = train.end()
    assert ended.code == 0, whole.story(ended)
    books = [check_finished(run.folder, run.config) for run in (whole, broken)]
    assert len(books[1].rollbacks) >= (0 if every == 1 else 3)
    assert_same_training(*books)
    assert_same_state(whole, broken)
    assert moved(whole)


@pytest.mark.slow
def test_a_kill_amid_a_batch_leaves_no_trace(new_run: Callable[..., Run]) -> None:
    """Some of a batch was sampled on the branch that the kill gave up, the rest of it is not."""
    settings = ("steps=5", "optim.minibatches=2", "checkpoint.every=5")
    whole = new_run("whole", *settings)
    broken = new_run("broken", *settings, "environment.tool_latency_s=0.2")
    train, process = whole.start("--serial"), broken.start("--serial")
    broken.reach(1, process)
    # At most half of it, so that it is not whole before the signal arrives.
    until(lambda: 0 < len(read_books(broken.folder).buffered) <= 8, "part of a batch")
    process.signal(signal.SIGKILL)
    assert process.end().code == -signal.SIGKILL
    kept = len(read_books(broken.folder).buffered)
    ended = broken.resume("--serial").end()
    assert ended.code == 0, broken.story(ended)
    ended = train.end()
    assert ended.code == 0, whole.story(ended)
    books = [check_finished(run.folder, run.config) for run in (whole, broken)]
    assert books[1].rollbacks == [0]
    assert 0 < kept < 16
    assert list(books[1].dropped.values()).count("dropped_by_slip") >= kept
    assert_same_training(*books)
    assert_same_state(whole, broken)
    assert moved(whole)


@pytest.mark.slow
def test_serial_and_asynchronous_runs_are_equal_at_slip_0(new_run: Callable[..., Run]) -> None:
    serial, processes = new_run("serial", "max_slip=0"), new_run("processes", "max_slip=0")
    for train, run in ((serial.start("--serial"), serial), (processes.start(), processes)):
        ended = train.end()
        assert ended.code == 0, run.story(ended)
    books = [check_finished(run.folder, run.config) for run in (serial, processes)]
    assert_same_training(*books)
    assert last_weights(serial) == last_weights(processes)
    assert summary(processes)["slip_max"] == 0
    assert moved(serial)
