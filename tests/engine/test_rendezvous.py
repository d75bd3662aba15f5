"""How a role that joins finds the hub: at once, when it comes, or not at all; one identity for a folder."""

from __future__ import annotations

import fcntl
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slipstream import rendezvous
from slipstream.deadlines import Deadlines
from slipstream.errors import AddressError, DeadlineError
from slipstream.rendezvous import (
    announce_address,
    announce_end,
    announce_start,
    await_hub,
    expect_hub,
    hub_address,
    known_address,
)


def test_all_who_ask_get_the_same_identity(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(rendezvous.run_id, [tmp_path] * 32))
    assert len(found) == 1 and len(found.pop()) == 16


def test_a_lock_that_is_kept_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "LOCK_S", 0.05)
    with (tmp_path / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DeadlineError, match=r"waited 0\.05 s for the lock of .*/run\.json"):
            rendezvous.run_id(tmp_path)
    assert rendezvous.run_id(tmp_path)


HANGS_S = 100.0


def test_without_a_hub_nobody_waits(tmp_path: Path) -> None:
    with pytest.raises(AddressError, match="start `slipstream hub` first"):
        await_hub(tmp_path, "actor a")


def test_a_run_that_is_done_is_refused_at_once(tmp_path: Path) -> None:
    announce_address(tmp_path, "tcp://h:1", "r")
    announce_end(tmp_path, "r")
    with pytest.raises(AddressError, match="the run is done, nobody can join it"):
        await_hub(tmp_path, "actor a")


@pytest.mark.parametrize("again", [False, True])
def test_a_hub_that_was_started_is_waited_for(tmp_path: Path, again: bool) -> None:
    if again:
        announce_address(tmp_path, "tcp://h:1", "r")
        assert announce_start(tmp_path) == announce_start(tmp_path) == "tcp://h:1"
    else:
        expect_hub(tmp_path)
    assert known_address(tmp_path) == ""
    found: list[str] = []
    waiting = threading.Thread(target=lambda: found.append(await_hub(tmp_path, "actor a")), daemon=True)
    waiting.start()
    announce_address(tmp_path, "tcp://h:2", "r")
    waiting.join(HANGS_S)
    assert found == [hub_address(tmp_path)] == ["tcp://h:2"]


def test_a_hub_that_never_listens_is_named(tmp_path: Path) -> None:
    expect_hub(tmp_path)
    with pytest.raises(DeadlineError, match=r"actor a waited 0\.1 s for the hub to write its address into"):
        await_hub(tmp_path, "actor a", deadlines=Deadlines(start_s=0.1))
