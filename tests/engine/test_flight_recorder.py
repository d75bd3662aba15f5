"""The ring of a process: what a reader finds after any kind of end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slipstream.errors import RunFolderError
from slipstream.flight_recorder import SLOT_BYTES, SLOTS, FlightRecorder, read_flight, read_flights

WRITER = """
import os, signal, sys
from pathlib import Path
from slipstream.flight_recorder import FLIGHT
FLIGHT.start(Path(sys.argv[1]))
for number in range(int(sys.argv[2])):
    FLIGHT.note(f"event {number}")
FLIGHT.waits("batch 7 of the hub", 900.0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def recorded(path: Path, texts: list[str]) -> FlightRecorder:
    recorder = FlightRecorder()
    recorder.start(path)
    for text in texts:
        recorder.note(text)
    return recorder


@pytest.mark.parametrize("count", [0, 1, SLOTS, SLOTS + 5])
def test_the_last_events_survive_sigkill(tmp_path: Path, count: int) -> None:
    path = tmp_path / "flight" / "learner-0.ring"
    done = subprocess.run([sys.executable, "-c", WRITER, str(path), str(count)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    flight = read_flight(path)
    kept = [f"event {number}" for number in range(max(0, count - SLOTS), count)]
    assert [event.text for event in flight.events] == kept
    assert (flight.role, flight.count, flight.ended) == ("learner-0", count, 0.0)
    assert flight.wait is not None
    assert (flight.wait.what, flight.wait.seconds) == ("batch 7 of the hub", 900.0)
    assert flight.heard <= flight.wait.since <= time.monotonic()
    assert all(flight.started <= event.time <= time.time() for event in flight.events)


def test_torn_slots_and_waits_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "hub-0.ring"
    recorder = recorded(path, ["first", "second", "third"])
    recorder.waits("a word of the hub", 1.0)
    data = bytearray(path.read_bytes())
    for torn in (b"second", b"a word of"):
        data[data.index(torn)] ^= 0xFF
    path.write_bytes(data)
    flight = read_flight(path)
    assert [event.text for event in flight.events] == ["first", "third"]
    assert flight.wait is None


def test_every_cut_and_flip_is_read_without_an_error(tmp_path: Path) -> None:
    path, damaged = tmp_path / "hub-0.ring", tmp_path / "damaged.ring"
    recorded(path, ["one", "two"])
    data = path.read_bytes()
    for cut in (1024, 1024 + SLOT_BYTES // 2, 1024 + SLOT_BYTES, len(data) - 1):
        damaged.write_bytes(data[:cut])
        read_flight(damaged)
    for at in range(8, 1024 + 2 * SLOT_BYTES):
        damaged.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 : 1024 + 4 * SLOT_BYTES])
        read_flight(damaged)


def test_another_file_is_refused_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "notes.ring").write_text("hello")
    with pytest.raises(
        RunFolderError, match=r"notes\.ring: expected a flight recorder's ring, got 5 other bytes"
    ):
        read_flight(tmp_path / "notes.ring")
    recorded(tmp_path / "hub-0.ring", [])
    assert [flight.role for flight in read_flights(tmp_path)] == ["hub-0"]


def test_waits_end_and_long_words_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "actor-0.ring"
    recorder = recorded(path, ["x" * 1000])
    recorder.waits("credit", 5.0)
    assert read_flight(path).wait is not None
    recorder.goes_on()
    flight = read_flight(path)
    assert flight.wait is None
    assert 100 < len(flight.events[0].text) < SLOT_BYTES and set(flight.events[0].text) == {"x"}


def test_the_ring_of_the_process_before_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "actor-0.ring"
    recorded(path, ["of the first life"])
    recorded(path, ["of the second"])
    assert [event.text for event in read_flight(path).events] == ["of the second"]
    assert [event.text for event in read_flight(path.with_suffix(".before")).events] == ["of the first life"]


def test_nothing_is_recorded_before_the_start() -> None:
    recorder = FlightRecorder()
    recorder.note("nowhere")
    recorder.waits("nobody", 1.0)
    recorder.goes_on()
    recorder.end()


def test_stacks_are_written_on_request(tmp_path: Path) -> None:
    path = tmp_path / "hub-0.ring"
    code = (
        "import sys, os; from pathlib import Path\n"
        "from slipstream.flight_recorder import FLIGHT, STACKS\n"
        "def stuck_here():\n    os.kill(os.getpid(), STACKS)\n"
        "FLIGHT.start(Path(sys.argv[1])); stuck_here()"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], timeout=60, check=True, env=dict(os.environ))
    assert "in stuck_here" in path.with_suffix(".stacks").read_text()
