"""`kill -9` of each role in the middle of a run, and Ctrl-C: nothing is lost, nothing is trained twice."""

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from books import check_finished, read_books
from runs import UNHURRIED, Run, until

from slipstream import checkpoint

pytestmark = pytest.mark.timeout(600)
KILL_AT = 5
NO_CHECKPOINT = "checkpoint.every=1000"
"""Whenever the learner is killed, something is lost that must be done again."""


def check_resumed(run: Run) -> None:
    """Resume an interrupted run to its end."""
    ended = run.resume().end()
    assert ended.code == 0, run.story(ended)
    check_finished(run.folder, run.config)


@pytest.mark.parametrize("role", ["learner", pytest.param("hub", marks=pytest.mark.slow)])
def test_the_run_ends_with_advice_and_resumes(new_run: Callable[..., Run], role: str) -> None:
    run = new_run("run", *UNHURRIED, NO_CHECKPOINT)
    train = run.start()
    run.reach(KILL_AT, train)
    train.roles()[role].kill()
    ended = train.end()
    assert ended.code == 1, run.story(ended)
    assert f"{role}-0 was killed by SIGKILL" in ended.err
    assert f"continue with: slipstream train --output {run.folder} --resume" in ended.err
    assert "Traceback" not in ended.err
    check_resumed(run)
    books = read_books(run.folder)
    if role == "learner":
        assert books.rollbacks == [0]


@pytest.mark.slow
def test_an_actor_is_started_again(new_run: Callable[..., Run]) -> None:
    run = new_run("run", *UNHURRIED)
    train = run.start()
    run.reach(KILL_AT, train)
    train.roles()["actor"].kill()
    ended = train.end()
    assert ended.code == 0, run.story(ended)
    assert re.search("actor-0 was killed by SIGKILL .*; restart 1 of", ended.out)
    books = check_finished(run.folder, run.config)
    assert {identity.epoch for identity in books.received} == {0, 1}


@pytest.mark.slow
def test_no_role_outlives_the_launcher(new_run: Callable[..., Run]) -> None:
    run = new_run("run", *UNHURRIED)
    train = run.start()
    run.reach(KILL_AT, train)
    roles = train.roles()
    assert set(roles) == {"hub", "actor", "learner"}
    train.signal(signal.SIGKILL)
    assert train.end().code == -signal.SIGKILL
    until(lambda: not any(map(is_alive, roles.values())), "all roles to end", 30.0)
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
    train.roles()["learner"].kill()
    assert train.end().code == 1
    before = checkpoint.verify(best)
    check_resumed(run)
    after = checkpoint.verify(best)
    assert after["success"] >= before["success"]
    if after["success"] == before["success"]:
        assert after["files"] == before["files"]
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["slip_max"] <= run.config.max_slip
    assert read_books(run.folder).rollbacks == [0]
