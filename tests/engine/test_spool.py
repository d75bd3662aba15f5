"""The spool loses nothing it has promised to keep."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slipstream import spool as module
from slipstream import synthetic, wire
from slipstream.errors import RunFolderError, StorageError
from slipstream.spool import Spool, spools_in

RECORDS = [bytes(wire.encode_trajectory(synthetic.trajectory(tokens))) for tokens in (3, 9, 2)]
ENDS = [sum(16 + len(record) for record in RECORDS[: n + 1]) for n in range(len(RECORDS))]


def filled(path: Path) -> bytes:
    """Fill a spool and return what its only segment holds."""
    spool = Spool(path)
    for number, record in enumerate(RECORDS):
        assert spool.append(number, record) == number
    spool.close()
    return segment(path).read_bytes()


def segment(path: Path, number: int = 0) -> Path:
    return path.with_name(f"{path.name}.{number}")


def held(path: Path) -> list[tuple[int, bytes]]:
    spool = Spool(path)
    records = list(spool.pending())
    spool.close()
    return records


def test_records_come_back_until_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "a"
    filled(path)
    spool = Spool(path)
    assert not spool.notes
    assert list(spool.pending()) == list(enumerate(RECORDS))
    spool.acknowledge([1])
    assert [seq for seq, _ in spool.pending()] == [0, 2]
    assert spool.next_seq == 3
    spool.acknowledge([0, 2, 99])
    spool.close()
    assert not segment(path).exists()


def test_a_segment_torn_at_any_byte_keeps_its_whole_records(tmp_path: Path) -> None:
    data = filled(tmp_path / "a")
    for cut in range(len(data)):
        path = tmp_path / f"cut-{cut}"
        segment(path).write_bytes(data[:cut])
        whole = sum(end <= cut for end in ENDS)
        assert held(path) == list(enumerate(RECORDS))[:whole]
        assert not segment(path).exists() or segment(path).stat().st_size == [0, *ENDS][whole]


def test_a_torn_segment_takes_new_records(tmp_path: Path) -> None:
    path = tmp_path / "a"
    segment(path).write_bytes(filled(path)[: ENDS[-1] - 1])
    spool = Spool(path)
    assert spool.notes == [f"{path}.0: cut {ENDS[2] - 1 - ENDS[1]} bytes of a record torn by a crash"]
    assert spool.append(2, RECORDS[0]) == 2
    spool.close()
    assert held(path)[-1] == (2, RECORDS[0])


def test_damage_at_any_byte_costs_only_its_record(tmp_path: Path) -> None:
    data = filled(tmp_path / "a")
    for position in range(ENDS[-2]):
        path = tmp_path / f"bad-{position}"
        bad = bytearray(data)
        bad[position] ^= 0x40
        segment(path).write_bytes(bytes(bad))
        hit = sum(end <= position for end in ENDS)
        assert held(path) == [pair for pair in enumerate(RECORDS) if pair[0] != hit]
        assert Path(f"{path}.0.quarantined").read_bytes() == bytes(bad)


def test_damage_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a"
    bad = bytearray(filled(path))
    bad[20] ^= 1
    segment(path).write_bytes(bytes(bad))
    spool = Spool(path)
    assert spool.notes == [f"{path}.0: damaged; kept as a.0.quarantined, 2 valid records saved"]
    assert spool.next_seq == 3
    spool.close()


def small_segments(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", size)
    monkeypatch.setattr(module, "_RESET_BYTES", 0)


def test_acknowledged_segments_are_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_segments(monkeypatch, 2 * ENDS[0])
    path = tmp_path / "a"
    spool = Spool(path)
    for seq in range(40):
        spool.append(seq, RECORDS[0])
        # Three are always unacknowledged: two segments, and a third that begins before the first is free.
        spool.acknowledge([seq - 3])
    assert len(list(tmp_path.glob("a.[0-9]*"))) == 3
    assert [seq for seq, _ in spool.pending()] == [37, 38, 39]
    spool.close()


@pytest.mark.parametrize("written", range(7))
def test_a_write_over_old_records_torn_at_any_byte_loses_none_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """Old ones come back only while the first of the new ones is not whole; the hub knows them."""
    small_segments(monkeypatch, 1 << 20)
    path = tmp_path / "a"
    spool = Spool(path)
    for seq in range(6):
        spool.append(seq, RECORDS[0])
    spool.acknowledge(range(6))
    for seq in range(6, 6 + written):
        spool.append(seq, RECORDS[1])
    kept = [(seq, RECORDS[1]) for seq in range(6, 6 + written)]
    before = segment(path).read_bytes()
    spool.append(spool.next_seq, RECORDS[2])
    after = segment(path).read_bytes()
    spool.close()
    start = written * (16 + len(RECORDS[1]))
    end = start + 16 + len(RECORDS[2])
    # Torn before its start, the file is what it was.
    assert after[:start] == before[:start]
    for cut in range(start, end + 16):
        torn = tmp_path / f"torn-{cut}"
        segment(torn).write_bytes(after[:cut] + before[cut:])
        new = [(6 + written, RECORDS[2])] if after[:cut] + before[cut:] == after or cut >= end else []
        found = held(torn)
        assert [pair for pair in found if pair[0] >= 6] == kept + new
        assert not written or found == kept + new


def test_a_record_larger_than_a_segment_has_one_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_segments(monkeypatch, 16)
    path = tmp_path / "a"
    filled(path)
    assert [segment(path, n).stat().st_size for n in range(3)] == [16 + len(r) + 16 for r in RECORDS]
    assert held(path) == list(enumerate(RECORDS))
    assert spools_in(tmp_path) == [path]


def test_the_cap_is_an_error_and_acknowledged_bytes_are_room(tmp_path: Path) -> None:
    first, second = RECORDS[0], RECORDS[2]
    limit = 2 * (16 + len(first)) - 1
    spool = Spool(tmp_path / "a", limit_bytes=limit)
    spool.append(0, first)
    size = 16 + len(first)
    with pytest.raises(StorageError, match=f"holds {size} of {limit} bytes and cannot take {size} more"):
        spool.append(1, first)
    spool.append(1, second)
    spool.acknowledge([0])
    spool.append(2, second)
    assert list(spool.pending()) == [(1, second), (2, second)]
    spool.close()
    assert held(tmp_path / "a") == [(0, first), (1, second), (2, second)], "the first may be sent again"


def test_two_processes_cannot_share_a_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a")
    with pytest.raises(RunFolderError, match="another process uses this spool"):
        Spool(tmp_path / "a")
    spool.close()


def test_a_failed_write_is_named_and_costs_nothing_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    spool = Spool(path)
    spool.append(0, RECORDS[0])

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "pwritev", full)
        with pytest.raises(StorageError, match=r"a\.0: writing failed \(No space left on device\); free"):
            spool.append(1, RECORDS[1])
    spool.close()
    assert held(path) == [(0, RECORDS[0])]


def test_a_short_write_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda file, buffers, at: real(file, [b"".join(buffers)[:21]], at))
    filled(tmp_path / "a")
    assert held(tmp_path / "a") == list(enumerate(RECORDS))


def test_after_a_failure_nothing_is_taken_or_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def failing(_file: int) -> None:
        calls.append(1)
        raise OSError(5, "Input/output error")

    spool = Spool(tmp_path / "a", durability="power")
    spool.append(0, RECORDS[0])
    with monkeypatch.context() as context:
        context.setattr(os, "fdatasync", failing)
        with pytest.raises(StorageError, match="fdatasync failed"):
            spool.append(1, RECORDS[1])
    # The disk works again, and still the kernel may have dropped what it was given.
    for refused in (
        lambda: spool.append(2, RECORDS[0]),
        lambda: spool.write(2, RECORDS[0]),
        spool.sync,
        lambda: spool.acknowledge([0]),
        lambda: spool.read(0),
        lambda: list(spool.pending()),
    ):
        with pytest.raises(StorageError, match="takes and gives nothing"):
            refused()
    assert len(calls) == 1, "fdatasync was tried again"
    spool.close()
    again = Spool(tmp_path / "a", durability="power")
    assert next(iter(again.pending())) == (0, RECORDS[0])
    assert again.append(again.next_seq, RECORDS[2])
    again.close()


def test_records_written_together_share_one_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda file: (synced.append(file), real(file)))
    spool = Spool(tmp_path / "a", durability="power")
    for number, record in enumerate(RECORDS):
        spool.write(number, record)
    assert not synced
    spool.sync()
    assert len(synced) == 1
    spool.sync()
    assert len(synced) == 1, "nothing new was written"
    spool.append(3, RECORDS[0])
    assert len(synced) == 2
    spool.close()


def test_records_in_two_segments_are_both_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_segments(monkeypatch, 16)
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    spool = Spool(tmp_path / "a", durability="power")
    spool.write(0, RECORDS[0])
    spool.write(1, RECORDS[1])
    spool.sync()
    assert len(set(synced)) == 2
    spool.close()


def test_durability_of_a_process_needs_no_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fdatasync", lambda _: pytest.fail("synced"))
    spool = Spool(tmp_path / "a")
    spool.append(0, RECORDS[0])
    spool.close()
