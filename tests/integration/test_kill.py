"""`kill -9` of each role at any time: the run goes on, nothing is lost, nothing doubled; and Ctrl-C."""

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from books import check_finished, read_books
from runs import UNHURRIED, Process, Run, until

from slipstream import checkpoint
from slipstream.flight_recorder import FOLDER, read_flight
from slipstream.metrics import read_rows
from slipstream.restarts import restarts_of

pytestmark = pytest.mark.timeout(1800)
KILL_AT = 5
NO_CHECKPOINT = "checkpoint.every=1000"
"""Whenever the learner is killed, something is lost that must be done again."""


PATIENT = ("supervision.restarts=100", "supervision.actor_restarts=100", "supervision.backoff_s=0.1")
SEED = random.SystemRandom().randrange(1 << 32)


def check_ended(run: Run, train: Process) -> dict[str, Any]:
    """Wait for a run's end; check its books by an independent reading, and return its summary."""
    ended = train.end()
    assert ended.code == 0, run.story(ended)
    check_finished(run.folder, run.config)
    summary: dict[str, Any] = json.loads((run.folder / "summary.json").read_text())
    assert (summary["lost"], summary["doubled"]) == (0, 0), ended.out
    assert summary["restarts"] == sum(summary["restarts_by_role"].values())
    assert f"0 trajectories lost, 0 doubled, {summary['restarts']} processes started again" in ended.out
    return summary


def check_resumed(run: Run) -> None:
    """Resume an interrupted run to its end."""
    check_ended(run, run.resume())


def roles_of(train: Process) -> list[psutil.Process]:
    """Wait until hub, actor and learner run, and return them."""
    until(lambda: {"hub", "actor", "learner"} <= set(train.roles()), "the roles")
    return list(train.roles().values())


def kill(train: Process, *roles: str) -> None:
    """Kill these roles at once."""
    found = train.roles()
    for role in roles:
        found[role].kill()


@pytest.mark.parametrize(
    "roles",
    [
        ["learner"],
        pytest.param(["hub"], marks=pytest.mark.slow),
        pytest.param(["actor"], marks=pytest.mark.slow),
        pytest.param(["hub", "learner"], marks=pytest.mark.slow),
        pytest.param(["hub", "learner", "actor"], marks=pytest.mark.slow),
    ],
)
def test_the_run_goes_on_without_whom_was_killed(new_run: Callable[..., Run], roles: list[str]) -> None:
    run = new_run("run", *UNHURRIED, NO_CHECKPOINT)
    train = run.start()
    run.reach(KILL_AT, train)
    kill(train, *roles)
    summary = check_ended(run, train)
    assert summary["restarts_by_role"] == dict.fromkeys(sorted(roles), 1)
    books = read_books(run.folder)
    if "learner" in roles:
        assert books.rollbacks == [0]
    if "actor" in roles:
        assert {identity.epoch for identity in books.received} > {0}


@pytest.mark.slow
def test_the_warm_start_goes_on_when_it_was_killed(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ["warmup.max_steps=200", "steps=2"])
    train = run.start()
    until(lambda: bool(read_rows(run.folder)), "the warm start to begin")
    kill(train, "warmup")
    assert check_ended(run, train)["restarts_by_role"] == {"warmup": 1}


@pytest.mark.slow
def test_the_final_evaluation_goes_on_when_it_was_killed(new_run: Callable[..., Run]) -> None:
    run = new_run("run", "steps=2")
    train = run.start()
    until(lambda: "eval" in train.roles(), "the final evaluation to begin")
    kill(train, "eval")
    assert check_ended(run, train)["restarts_by_role"] == {"eval": 1}


@pytest.mark.slow
@pytest.mark.parametrize("roles", [["learner"], ["hub"], ["hub", "learner"], ["actor"]])
def test_the_last_evaluation_survives_whoever_is_killed(
    new_run: Callable[..., Run], roles: list[str]
) -> None:
    run = new_run("run", "evaluation.tasks=256", "environment.tool_latency_s=0.1", *PATIENT)
    train = run.start()
    until(lambda: checkpoint_of(run) == run.config.steps, "the last step to be in a checkpoint")
    kill(train, *roles)
    assert check_ended(run, train)["restarts_by_role"] == dict.fromkeys(sorted(roles), 1)


def checkpoint_of(run: Run) -> int:
    """Return the step of the newest checkpoint."""
    steps = [int(path.name.partition("-")[2]) for path in (run.folder / "checkpoints").glob("step-*")]
    return max(steps, default=0)


@pytest.mark.slow
def test_a_hub_that_dies_before_it_says_stop_is_told_once_more(new_run: Callable[..., Run]) -> None:
    """The learner says Finish into a hub that stands still, and that never wakes."""
    run = new_run("run", *PATIENT)
    train = run.start()
    run.reach(run.config.steps, train)
    hub, ring = train.roles()["hub"], run.folder / FOLDER / "learner-0.ring"
    until(lambda: "checkpoint of step 6 published" in told(ring), "the learner to save for the last time")
    hub.send_signal(signal.SIGSTOP)
    until(lambda: hub.status() == "stopped" or not is_alive(hub), "the hub to stand still")
    hub.kill()
    check_ended(run, train)


def told(ring: Path) -> str:
    """Return all that a process has noted."""
    return "\n".join(event.text for event in read_flight(ring).events)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(3))
def test_roles_killed_at_random_again_and_again(new_run: Callable[..., Run], number: int) -> None:
    seed = SEED + number
    print(f"seed {seed}")
    chance = random.Random(seed)
    run = new_run("run", *UNHURRIED, "steps=24", *PATIENT)
    train, kills = run.start(), 0
    for step in sorted(chance.sample(range(run.config.steps - 4), 7)):
        run.reach(step, train)
        time.sleep(chance.uniform(0.0, 0.3))  # somewhere within a step, not at its row
        some = chance.sample(["hub", "actor", "learner"], chance.choice([1, 1, 1, 2, 3]))
        for role, process in train.roles().items():
            if role in some and is_alive(process):
                process.kill()
                kills += 1
    summary = check_ended(run, train)
    assert summary["restarts"] >= kills >= 1, f"seed {seed}"


@pytest.mark.slow
@pytest.mark.parametrize("role", ["hub", "actor", "learner"])
def test_a_role_asked_to_stop_by_a_scheduler_is_started_again(new_run: Callable[..., Run], role: str) -> None:
    run = new_run("run", *UNHURRIED, NO_CHECKPOINT, "supervision.restarts=0", "supervision.actor_restarts=0")
    train = run.start()
    run.reach(KILL_AT, train)
    train.roles()[role].terminate()
    summary = check_ended(run, train)
    assert summary["restarts_by_role"] == {role: 1}
    rollbacks = read_books(run.folder).rollbacks
    assert all(step >= KILL_AT for step in rollbacks), "a learner that is asked saves where it stands"


@pytest.mark.slow
def test_no_role_outlives_the_launcher(new_run: Callable[..., Run]) -> None:
    run = new_run("run", *UNHURRIED)
    train = run.start()
    run.reach(KILL_AT, train)
    roles = train.roles()
    assert set(roles) == {"hub", "actor", "learner"}
    train.signal(signal.SIGKILL)
    assert train.end().code == -signal.SIGKILL
    until(lambda: not any(map(is_alive, roles.values())), "all roles to end")
    check_resumed(run)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_in_order_and_resumes(new_run: Callable[..., Run], number: signal.Signals) -> None:
    run = new_run("run", *UNHURRIED)
    train = run.start()
    run.reach(KILL_AT, train)
    train.signal(number)
    ended = train.end()
    assert ended.code == 130, run.story(ended)
    assert f"continue with: slipstream train --output {run.folder} --resume" in ended.out
    saved = checkpoint.load_latest(run.folder / "checkpoints").step
    assert saved >= KILL_AT, "the learner saves where it stands"
    forget_a_row(run.folder / "metrics.jsonl", saved)
    check_resumed(run)
    assert all(step >= saved for step in read_books(run.folder).rollbacks)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sigterm_at_random_times(new_run: Callable[..., Run]) -> None:
    """Each time it ends with 130 within the grace, no role is left, and the learner has saved what it did."""
    print(f"seed {SEED}")
    chance, run = random.Random(SEED), new_run("run", *UNHURRIED, "steps=40", "supervision.grace_s=60")
    for _ in range(6):
        train = run.start()
        done = run.steps_done()
        roles = roles_of(train)
        if chance.random() < 0.7:
            run.reach(min(done + 1 + chance.randrange(3), run.config.steps - 1), train)
        time.sleep(chance.uniform(0.0, 2.0))  # the moment is what is tested
        train.signal(signal.SIGTERM)
        ended = train.end()
        assert ended.code == 130, run.story(ended)
        assert "ignored SIGTERM" not in ended.out, ended.out
        assert not any(map(is_alive, roles))
        assert checkpoint_of(run) >= run.steps_done() or not run.steps_done()
    check_resumed(run)
    assert not restarts_of(run.folder)


def forget_a_row(path: Path, step: int) -> None:
    """Remove a train row if it is there: a hub that dies before it has written it leaves none."""
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if (json.loads(line)["kind"], json.loads(line)["step"]) != ("train", step)]
    assert len(kept) >= len(lines) - 1
    path.write_text("".join(kept))


def is_alive(process: psutil.Process) -> bool:
    """A zombie has ended."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_slip_and_the_best_checkpoint_after_a_rollback(new_run: Callable[..., Run]) -> None:
    """The learner dies behind its last checkpoint; tokens of the branch given up are too old."""
    run = new_run("run", *UNHURRIED, "evaluation.every=2", NO_CHECKPOINT)
    train = run.start()
    best = run.folder / "checkpoints" / "best"
    until(best.exists, "a best checkpoint")
    run.reach(7, train)
    train.signal(signal.SIGKILL)
    assert train.end().code == -signal.SIGKILL
    before = checkpoint.verify(best)
    check_resumed(run)
    after = checkpoint.verify(best)
    assert after["success"] >= before["success"]
    if after["success"] == before["success"]:
        assert after["files"] == before["files"]
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["slip_max"] <= run.config.max_slip
    assert read_books(run.folder).rollbacks == [0]
