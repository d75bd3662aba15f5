"""The log is followed to its end, over segments, torn ends and damage, and its records are found again."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_runs import RunMaker, episode

from slipstream import events
from slipstream.chat import Chat
from slipstream.errors import RunFolderError
from slipstream.viewing.log import LogReader, Place
from slipstream.wire import decode_trajectory


def seqs(reader: LogReader) -> list[int]:
    """Read what is new and return the numbers of the episodes in it; each record is that of its event."""
    numbers = []
    for found in reader.fresh():
        if isinstance(found.event, events.Received):
            assert decode_trajectory(bytes(found.record)).identity == found.event.identity
            numbers.append(found.event.identity.seq)
    return numbers


def test_what_is_appended_later_is_read_later_and_once(tmp_path: Path, chat: Chat) -> None:
    run, reader = RunMaker(tmp_path, segment_bytes=4000), LogReader(tmp_path / "trajectories")
    assert seqs(reader) == []
    for seq in range(3):
        run.receive(episode(chat, "a?", "b", seq=seq))
    run.log.flush()
    assert seqs(reader) == [0, 1, 2] and seqs(reader) == []
    for seq in range(3, 40):
        run.receive(episode(chat, "a?", "b", seq=seq))
    run.close()
    assert len(list((tmp_path / "trajectories").glob("*.index"))) > 2
    assert seqs(reader) == list(range(3, 40))
    assert reader.at_end and reader.notes == [] and reader.bytes_read == reader.bytes_there
    # From the beginning, by indexes alone and without any.
    assert seqs(LogReader(tmp_path / "trajectories")) == list(range(40))
    for path in (tmp_path / "trajectories").glob("*.index"):
        path.unlink()
    assert seqs(LogReader(tmp_path / "trajectories")) == list(range(40))


def test_an_open_log_may_be_left_in_the_middle(tmp_path: Path, chat: Chat) -> None:
    run = RunMaker(tmp_path)
    for seq in range(3):
        run.receive(episode(chat, "a?", "b", seq=seq))
    run.close()
    reader = LogReader(tmp_path / "trajectories")
    fresh = reader.fresh()
    next(fresh)
    fresh.close()
    assert seqs(reader) == [1, 2]


def test_removed_segments_are_said(tmp_path: Path, chat: Chat) -> None:
    run = RunMaker(tmp_path, segment_bytes=2000)
    for seq in range(12):
        run.receive(episode(chat, "a?", "b", seq=seq))
    run.close()
    (tmp_path / "trajectories/000000.log").unlink()
    reader = LogReader(tmp_path / "trajectories")
    assert seqs(reader)[-1] == 11
    assert "begins with segment 1" in reader.notes[0] and "hub.retain_bytes" in reader.notes[0]
    with pytest.raises(RunFolderError, match=r"000000\.log is gone"):
        reader.record(Place(segment=0, offset=0))


def test_a_torn_end_waits_and_damage_is_said_and_passed_over(tmp_path: Path, chat: Chat) -> None:
    run = RunMaker(tmp_path)
    for seq in range(3):
        run.receive(episode(chat, "a?", "b", seq=seq))
    run.close()
    path = tmp_path / "trajectories/000000.log"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    reader = LogReader(tmp_path / "trajectories")
    assert seqs(reader) == [0, 1] and reader.notes == []
    path.write_bytes(whole)
    assert seqs(reader) == [2]
    second = len(whole) // 3
    path.write_bytes(whole[: second + 60] + b"\xff" + whole[second + 61 :])
    reader = LogReader(tmp_path / "trajectories")
    assert seqs(reader) == [0, 2]
    assert reader.notes == [f"000000.log: {second} bytes at offset {second} are damaged."]


@pytest.mark.parametrize("text", ["", "1", "1.", ".5", "a.b", "1.5.6", "-1.5", "\u0661.5"])
def test_a_place_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"SEGMENT\.OFFSET"):
        Place.of(text)


@pytest.mark.parametrize("place", ["0.1", "0.99999999", "0.99999999999999999999", "7.0"])
def test_a_place_without_an_episode_is_one_sentence(tmp_path: Path, chat: Chat, place: str) -> None:
    run = RunMaker(tmp_path)
    run.receive(episode(chat, "a?", "b", seq=0))
    run.close()
    with pytest.raises(RunFolderError, match=r"00000\d\.log"):
        LogReader(tmp_path / "trajectories").record(Place.of(place))
