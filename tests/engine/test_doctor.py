"""The doctor's report on real processes: stopped, dead, stalled, well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slipstream.doctor import QUIET_S, examine
from slipstream.errors import RunFolderError
from slipstream.flight_recorder import FOLDER, read_flight

ROLE = """
import sys, time
from pathlib import Path
from slipstream.flight_recorder import FLIGHT
FLIGHT.start(Path(sys.argv[1]))
FLIGHT.note("batch 3 handed out")
if len(sys.argv) > 2:
    FLIGHT.waits(sys.argv[2], float(sys.argv[3]))
print("ready", flush=True)
sys.stdin.read()
FLIGHT.end()
"""


@contextmanager
def role(folder: Path, name: str, *wait: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", ROLE, str(folder / FOLDER / f"{name}.ring"), *wait],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_stopped_role_is_named_with_whoever_waits_for_it(tmp_path: Path) -> None:
    with (
        role(tmp_path, "learner-0") as learner,
        role(tmp_path, "hub-0", "the learner's next word", "900"),
        role(tmp_path, "actor-0"),
    ):
        learner.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(learner.pid, os.WUNTRACED)  # a signal takes its time to arrive
        assert os.WIFSTOPPED(status)
        report, well = examine(tmp_path)
    assert not well
    assert f"learner-0 (pid {learner.pid}) was stopped by a signal" in report
    assert f"kill -CONT {learner.pid}" in report
    assert "hub-0 waits for it: the learner's next word" in report
    assert "actor-0 (pid" not in report
    assert report.index("last events:") < report.index("batch 3 handed out")


def test_a_killed_role_is_dead_with_its_last_event(tmp_path: Path) -> None:
    with role(tmp_path, "actor-0") as actor:
        actor.kill()
        actor.wait(30)
        report, well = examine(tmp_path)
    assert not well
    assert f"actor-0 (pid {actor.pid}) died" in report
    assert "its last event: batch 3 handed out" in report


def test_a_silent_role_shows_its_stacks(tmp_path: Path) -> None:
    with role(tmp_path, "learner-0", "batch 4 of the hub", "5"):
        heard = read_flight(tmp_path / FOLDER / "learner-0.ring").heard
        report, well = examine(tmp_path, now=heard + QUIET_S + 1)
    assert not well
    assert "gave no sign of life for 61 s while it waits for batch 4 of the hub" in report
    assert "stacks of learner-0:" in report and 'File "<string>", line' in report


def test_ended_and_running_roles_are_well(tmp_path: Path) -> None:
    with role(tmp_path, "actor-0", "leases of the hub", "60") as actor, role(tmp_path, "hub-0"):
        report, well = examine(tmp_path)
        assert well and "nothing is wrong" in report
        actor.communicate("", timeout=30)
        report, well = examine(tmp_path)
        assert well and "ended" in report, report


def test_a_folder_without_rings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="expected rings of flight recorders, found none"):
        examine(tmp_path)


def test_a_foreign_process_of_the_same_number_is_never_signalled(tmp_path: Path) -> None:
    """A signal that a process does not handle would kill it."""
    path = tmp_path / FOLDER / "learner-0.ring"
    with role(tmp_path, "learner-0"):
        heard = read_flight(path).heard
        data = bytearray(path.read_bytes())
    sleeper = subprocess.Popen([sys.executable, "-c", "print('ready', flush=True); input()"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    try:
        assert sleeper.stdout is not None and sleeper.stdout.readline() == "ready\n"
        data[8:12] = sleeper.pid.to_bytes(4, "little")
        path.write_bytes(data)
        report, well = examine(tmp_path, now=heard + QUIET_S + 1, stalled="learner-0")
        assert not well and f"learner-0 (pid {sleeper.pid}) died" in report
        data[40:76] = b"00000000-0000-0000-0000-000000000000"
        path.write_bytes(data)
        report, well = examine(tmp_path, now=heard + QUIET_S + 1, stalled="learner-0")
        assert well and "elsewhere: ask on its machine" in report
        assert sleeper.poll() is None
    finally:
        sleeper.communicate("", timeout=30)
    assert sleeper.returncode >= 0
