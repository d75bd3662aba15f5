"""Real runs of which a process stands still: who says so, and how it ends."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from books import check_finished
from runs import UNHURRIED, Run, until

from slipstream.doctor import examine
from slipstream.flight_recorder import FOLDER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_learner_stopped_by_hand_is_explained_and_ended(new_run: Callable[..., Run]) -> None:
    run = new_run("run", *UNHURRIED, "stall_timeout_s=15")
    process = run.start()
    run.reach(2, process)
    learner = process.roles()["learner"]
    learner.send_signal(signal.SIGSTOP)
    until(lambda: learner.status() == "stopped", "the learner to stand still")
    report, well = examine(run.folder)
    assert not well and f"learner-0 (pid {learner.pid}) was stopped by a signal" in report
    assert "batch 1 handed out" in report and "hub-0" in report and "actor-0" in report
    ended = process.end()
    assert ended.code == 1, run.story(ended)
    assert "learner-0 gave no sign of life" in ended.out and "learner-0 was killed by SIGKILL" in ended.err
    (kept,) = (run.folder / FOLDER).glob("learner-0-*.stall")
    assert "was stopped by a signal" in kept.read_text()
    resumed = run.resume().end()
    assert resumed.code == 0, run.story(resumed)
    check_finished(run.folder, run.config)
