"""The log gives back what was appended, and says where it is damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slipstream import events, records, synthetic, wire
from slipstream.errors import RunFolderError, StorageError
from slipstream.events import AnyEvent
from slipstream.ingest import IngestLog, read_events, record_offsets
from slipstream.receiving import describe
from slipstream.types import Split

MADE = synthetic.trajectory(16)
EVENTS: list[AnyEvent] = [
    events.Epoch(actor="a", epoch=0, session="s"),
    events.GroupOpened(group=0, task=0, split=Split.TRAIN),
    describe(wire.inspect_trajectory(wire.encode_trajectory(MADE)), "buffered"),
    events.Trained(step=0, identities=(MADE.identity,)),
]


def filled(folder: Path, segment_bytes: int = 1 << 20) -> list[int]:
    log = IngestLog(folder, segment_bytes=segment_bytes)
    positions = []
    for event in EVENTS:
        record = wire.encode_trajectory(MADE) if isinstance(event, events.Received) else b""
        positions.append(log.append(event, record))
    log.close()
    return positions


def opened(folder: Path) -> list[AnyEvent]:
    log = IngestLog(folder)
    try:
        return [entry.event for entry in log.replay()]
    finally:
        log.close()


@pytest.mark.parametrize("segment_bytes", [1 << 20, 1])
def test_events_and_records_come_back(tmp_path: Path, segment_bytes: int) -> None:
    positions = filled(tmp_path, segment_bytes)
    entries = list(read_events(tmp_path))
    assert [entry.event for entry in entries] == EVENTS
    assert [entry.position for entry in entries] == positions
    assert wire.decode_trajectory(entries[2].record).identity == MADE.identity
    log = IngestLog(tmp_path, segment_bytes=segment_bytes)
    assert wire.decode_trajectory(log.read(positions[2])).token_ids.tolist() == MADE.token_ids.tolist()
    log.close()
    assert len(list(tmp_path.glob("*.log"))) == (1 if segment_bytes > 1 else 4)


def blocks_behind(path: Path) -> int:
    """Return the bytes that a file holds on its disk beyond its size."""
    held = path.stat()
    return 512 * held.st_blocks - held.st_size


def test_the_open_segment_holds_blocks_ahead_and_gives_them_back(tmp_path: Path) -> None:
    path, page = tmp_path / "blocks", os.sysconf("SC_PAGE_SIZE")
    path.touch()
    with path.open("r+b") as file:
        records.reserve(file.fileno(), 0, 1 << 20)
    if blocks_behind(path) < 1 << 20:
        pytest.skip("this file system reserves no blocks")
    record = wire.encode_trajectory(synthetic.trajectory(1 << 17))
    log = IngestLog(tmp_path, segment_bytes=4 * len(record))
    positions = [log.append(EVENTS[2], record)]
    log.flush()
    assert (tmp_path / "000000.log").stat().st_size < 2 * len(record) < 4 * len(record)
    assert blocks_behind(tmp_path / "000000.log") > 2 * len(record)
    positions += [log.append(EVENTS[2], record) for _ in range(4)]
    log.flush()
    assert blocks_behind(tmp_path / "000000.log") < page  # a full one is left with none
    assert all(log.read(position) == record for position in positions)
    log.close()
    assert blocks_behind(tmp_path / "000001.log") < page
    assert opened(tmp_path) == 5 * [EVENTS[2]]


def test_what_is_not_flushed_can_be_read(tmp_path: Path) -> None:
    log = IngestLog(tmp_path)
    position = log.append(EVENTS[2], wire.encode_trajectory(MADE))
    assert wire.decode_trajectory(log.read(position)).identity == MADE.identity
    log.close()


def test_the_index_can_be_rebuilt(tmp_path: Path) -> None:
    filled(tmp_path, 1 << 9)
    index = tmp_path / "000000.index"
    known = record_offsets(tmp_path, 0).tolist()
    assert known[0] == 0
    assert len(known) > 1
    index.unlink()
    assert record_offsets(tmp_path, 0).tolist() == known
    index.write_bytes(b"")
    assert record_offsets(tmp_path, 0).tolist() == known


def test_a_log_torn_at_any_byte_keeps_its_whole_events_and_goes_on(tmp_path: Path) -> None:
    filled(tmp_path / "whole")
    data = (tmp_path / "whole/000000.log").read_bytes()
    starts = [*record_offsets(tmp_path / "whole", 0).tolist(), len(data)]
    for cut in range(len(data)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "000000.log").write_bytes(data[:cut])
        whole = sum(end <= cut for end in starts[1:])
        assert [entry.event for entry in read_events(folder)] == EVENTS[:whole]
        log = IngestLog(folder)
        assert bool(log.notes) == (cut not in starts)
        log.append(EVENTS[0])
        log.close()
        assert opened(folder) == [*EVENTS[:whole], EVENTS[0]]


def test_damage_at_any_byte_names_file_and_offset(tmp_path: Path) -> None:
    filled(tmp_path / "whole")
    data = (tmp_path / "whole/000000.log").read_bytes()
    starts = record_offsets(tmp_path / "whole", 0).tolist()
    for position in range(starts[-1]):
        folder = tmp_path / str(position)
        folder.mkdir()
        bad = bytearray(data)
        bad[position] ^= 0x10
        (folder / "000000.log").write_bytes(bytes(bad))
        start = max(s for s in starts if s <= position)
        with pytest.raises(StorageError, match=rf"000000.log is damaged at offset {start}: .*restore"):
            IngestLog(folder)
        assert (folder / "000000.log").read_bytes() == bytes(bad)


def test_a_missing_or_cut_segment_is_damage(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    third = tmp_path / "000002.log"
    data = third.read_bytes()
    third.write_bytes(data[:-1])
    with pytest.raises(StorageError, match=r"000002\.log is damaged at offset 0"):
        IngestLog(tmp_path)
    third.unlink()
    with pytest.raises(StorageError, match="expected segments 0"):
        IngestLog(tmp_path)


def test_two_hubs_cannot_share_a_log(tmp_path: Path) -> None:
    log = IngestLog(tmp_path)
    with pytest.raises(RunFolderError, match="another hub writes this log"):
        IngestLog(tmp_path)
    log.close()


@pytest.mark.parametrize("follows", [False, True])
def test_a_sector_the_disk_had_not_written_when_the_power_failed_ends_the_log(
    tmp_path: Path, follows: bool
) -> None:
    positions = filled(tmp_path)
    path = tmp_path / "000000.log"
    data = bytearray(path.read_bytes())
    log = IngestLog(tmp_path)
    late = log.append(EVENTS[2], wire.encode_trajectory(synthetic.trajectory(200)))
    end = log.append(EVENTS[3]) if follows else None
    log.close()
    hole = bytearray(path.read_bytes()[:end] if end is None else path.read_bytes())
    first_sector = -(-late // 512) * 512
    hole[first_sector : first_sector + 512] = bytes(512)
    path.write_bytes(hole)
    assert [entry.event for entry in read_events(tmp_path)] == EVENTS
    log = IngestLog(tmp_path)
    assert log.notes == [f"{path}: cut {len(hole) - len(data)} bytes of an event torn by a crash"]
    assert path.read_bytes() == data
    assert log.append(EVENTS[0]) == late > positions[-1]
    log.close()


def test_other_bytes_than_zeros_in_a_sector_are_damage(tmp_path: Path) -> None:
    filled(tmp_path)
    log = IngestLog(tmp_path)
    late = log.append(EVENTS[2], wire.encode_trajectory(synthetic.trajectory(200)))
    log.close()
    path = tmp_path / "000000.log"
    data = bytearray(path.read_bytes())
    first_sector = -(-late // 512) * 512
    data[first_sector : first_sector + 512] = b"\1" * 512
    path.write_bytes(data)
    with pytest.raises(StorageError, match=f"damaged at offset {late}"):
        IngestLog(tmp_path)


def test_what_was_written_to_be_read_is_synced_by_the_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    log = IngestLog(tmp_path, "power")
    log.read(log.append(EVENTS[2], wire.encode_trajectory(MADE)))
    monkeypatch.setattr(os, "fdatasync", synced.append)
    log.flush()
    assert len(synced) == 1
    log.flush()
    assert len(synced) == 1
    monkeypatch.undo()
    log.close()


def test_after_a_failed_flush_no_segment_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, segment_bytes=1)
    before = sorted(tmp_path.glob("*.log"))
    log = IngestLog(tmp_path, segment_bytes=1 << 20)
    log.append(EVENTS[3])

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "writev", full)
        with pytest.raises(StorageError, match="No space left"):
            log.flush()
    assert log.shorten(None, retain_bytes=0) == 0
    assert sorted(tmp_path.glob("*.log")) == before
    log.close()
