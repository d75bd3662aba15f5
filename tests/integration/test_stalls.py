"""Real runs of which a process stands still: who says so, and that the run goes on."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from books import check_finished
from runs import UNHURRIED, Process, Run, until

from slipstream.doctor import examine
from slipstream.flight_recorder import FOLDER
from slipstream.metrics import read_rows
from slipstream.restarts import restarts_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STALL_S = 20


def stop(process: Process, role: str) -> psutil.Process:
    """Let a role stand still."""
    found = process.roles()[role]
    found.send_signal(signal.SIGSTOP)
    until(lambda: found.status() == "stopped", f"the {role} to stand still")
    return found


def gone(process: psutil.Process) -> bool:
    """A zombie is gone."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def check_restarted(run: Run, process: Process, stopped: psutil.Process, role: str) -> None:
    """The role that stands still is killed with a report; the run goes on."""
    began = time.monotonic()
    until(lambda: gone(stopped), f"the {role} to be killed")
    print(f"killed after {time.monotonic() - began:.0f} s of standing still, {STALL_S} are allowed")
    ended = process.end()
    assert ended.code == 0, run.story(ended)
    assert f"{role}-0 gave no sign of life for" in ended.out
    assert restarts_of(run.folder)[role] >= 1
    reports = [path.read_text() for path in (run.folder / FOLDER).glob(f"{role}-0-*.stall")]
    assert any(f"{role}-0 (pid {stopped.pid}) was stopped by a signal" in text for text in reports)
    check_finished(run.folder, run.config)


@pytest.mark.parametrize("role", ["learner", "hub", "actor"])
def test_a_role_stopped_by_hand_is_explained_and_started_again(
    new_run: Callable[..., Run], role: str
) -> None:
    run = new_run("run", *UNHURRIED, f"stall_timeout_s={STALL_S}")
    process = run.start()
    run.reach(2, process)
    stopped = stop(process, role)
    report, well = examine(run.folder)
    assert not well and f"{role}-0 (pid {stopped.pid}) was stopped by a signal" in report
    assert "batch 1 handed out" in report and "hub-0" in report and "actor-0" in report
    assert "queues: groups_buffered" in report
    check_restarted(run, process, stopped, role)


def test_a_warm_start_that_stands_still_is_started_again(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ["warmup.max_steps=200", "steps=2", f"stall_timeout_s={STALL_S}"])
    process = run.start()
    until(lambda: bool(read_rows(run.folder)), "the warm start to begin")
    check_restarted(run, process, stop(process, "warmup"), "warmup")


def test_a_hub_that_stands_still_is_blamed_by_its_clients(new_run: Callable[..., Run]) -> None:
    """They give it up long before its own time-out: they are not what is restarted too often."""
    run = new_run("run", *UNHURRIED, "supervision.actor_restarts=0", "stall_timeout_s=600")
    process = run.start()
    run.reach(2, process)
    stop(process, "hub")
    ended = process.end()
    assert ended.code == 0, run.story(ended)
    assert "hub-0 gave no sign of life for" in ended.out
    check_finished(run.folder, run.config)
