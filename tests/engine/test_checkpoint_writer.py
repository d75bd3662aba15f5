"""Checkpoints written beside the training: told when they are whole, failures never swallowed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from slipstream import checkpoint
from slipstream.checkpoint_writer import CheckpointWriter, Published


def writing(text: str, go: threading.Event | None = None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        assert go is None or go.wait(60)
        (folder / "state").write_text(text)

    return write


@pytest.mark.parametrize("background", [True, False])
def test_tells_what_is_on_disk_and_what_can_be_gone_back_to(tmp_path: Path, background: bool) -> None:
    writer = CheckpointWriter(tmp_path, keep=2, background=background)
    told = []
    for step in (20, 40, 60):
        assert writer.save(step, writing(f"of {step}"), 10)
        told.append(writer.settle())
    # With one checkpoint on disk the warm start is what a damaged one would leave.
    assert told == [
        Published(step=20, oldest=0),
        Published(step=40, oldest=20),
        Published(step=60, oldest=40),
    ]
    assert writer.settle() is writer.published() is None
    assert checkpoint.steps_in(tmp_path) == [60, 40]
    assert (checkpoint.load_latest(tmp_path).path / "state").read_text() == "of 60"


def test_nothing_is_told_before_it_is_on_disk(tmp_path: Path) -> None:
    writer, go = CheckpointWriter(tmp_path, keep=2, background=True), threading.Event()
    assert writer.save(20, writing("x", go), 10)
    assert writer.published() is None
    assert checkpoint.steps_in(tmp_path) == []
    go.set()
    assert writer.settle() == Published(step=20, oldest=0)


@pytest.mark.parametrize("background", [True, False])
def test_what_writing_raises_reaches_the_caller(tmp_path: Path, background: bool) -> None:
    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    def save_and_ask() -> None:
        writer.save(20, fail, 10)
        writer.settle()

    writer = CheckpointWriter(tmp_path, keep=2, background=background)
    with pytest.raises(OSError, match="No space left"):
        save_and_ask()
    assert checkpoint.steps_in(tmp_path) == []
    assert writer.save(40, writing("later"), 10)
    assert writer.settle() == Published(step=40, oldest=0)


def test_asks_for_room_before_it_begins(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "new", keep=1, background=False)
    assert not writer.save(20, writing("x"), 1 << 60)
    assert not list((tmp_path / "new").iterdir())
