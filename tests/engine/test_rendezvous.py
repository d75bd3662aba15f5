"""A run folder has one identity, whoever asks first, and a lock that nobody waits for without end."""

from __future__ import annotations

import fcntl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slipstream import rendezvous
from slipstream.errors import DeadlineError


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
