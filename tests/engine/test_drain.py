"""SIGTERM at random times to a supervisor of cheap roles: each keeps what it has, none outlives it."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from slipstream.stop_signals import StoppedBySignal
from slipstream.supervisor import Patience, RoleSpec, Supervisor

HANGS_S = 100.0
SEED = random.SystemRandom().randrange(1 << 32)
ROLE = """
import os, signal, sys
folder, pid = sys.argv[1], os.getpid()

def stop(number, frame):
    open(f"{folder}/saved-{pid}", "w").close()
    os._exit(75)

signal.signal(signal.SIGTERM, stop)
open(f"{folder}/ready-{pid}", "w").close()
while True:
    signal.pause()
"""


def note(folder: Path, text: str) -> None:
    with (folder / "events").open("a") as file:
        file.write(text + "\n")


def serve(folder: Path, pipe: int) -> NoReturn:
    """Be a launcher in this process, and end as it does."""
    told = []

    def tick() -> None:
        if not told:
            told.append(os.write(pipe, b"x"))

    roles = [
        RoleSpec(role=role, arguments=(str(folder), role), awaited=role == "learner", outlives=role == "hub")
        for role in ("hub", "actor", "learner")
    ]
    code = 1
    try:
        Supervisor(
            folder=folder,
            program=(sys.executable, "-S", "-E", "-c", ROLE),
            on_event=lambda text: note(folder, text),
            on_tick=tick,
            patience=Patience(stop_s=HANGS_S),
        ).supervise(roles)
    except StoppedBySignal:
        code = 130
    finally:
        os._exit(code)


def stop_once(folder: Path, delay_s: float) -> None:
    """Start a supervisor, ask it to stop after a while, and check what it leaves."""
    folder.mkdir()
    readable, writable = os.pipe()
    launcher = os.fork()
    if not launcher:
        serve(folder, writable)
    os.close(writable)
    assert os.read(readable, 1) == b"x"
    os.close(readable)
    time.sleep(delay_s)  # the moment is what is tested
    os.kill(launcher, signal.SIGTERM)
    _, status = os.waitpid(launcher, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    ready = {path.name.partition("-")[2] for path in folder.glob("ready-*")}
    saved = {path.name.partition("-")[2] for path in folder.glob("saved-*")}
    assert ready == saved, "who had come to its work has kept it"
    assert not (folder / "events").exists(), (folder / "events").read_text()
    assert not [pid for pid in ready if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("runs", [10, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_sigterm_at_any_time(tmp_path: Path, runs: int) -> None:
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    for number in range(runs):
        stop_once(tmp_path / str(number), chance.uniform(0.0, 0.2))
