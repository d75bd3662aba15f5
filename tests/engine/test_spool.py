"""The spool loses nothing it has promised to keep."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slipstream.errors import RunFolderError, StorageError
from slipstream.spool import Spool

PAYLOADS = [b"first", b"the second record", b"3"]


def filled(path: Path) -> bytes:
    spool = Spool(path)
    for number, payload in enumerate(PAYLOADS):
        assert spool.append(number, [payload[:2], payload[2:]]) == number
    spool.close()
    return path.read_bytes()


def held(path: Path) -> list[tuple[int, bytes]]:
    spool = Spool(path)
    records = list(spool.pending())
    spool.close()
    return records


def ends() -> list[int]:
    lengths = [16 + len(payload) for payload in PAYLOADS]
    return [sum(lengths[: n + 1]) for n in range(len(lengths))]


def test_records_come_back_until_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "a.spool"
    filled(path)
    spool = Spool(path)
    assert list(spool.pending()) == list(enumerate(PAYLOADS))
    spool.acknowledge([1])
    assert [seq for seq, _ in spool.pending()] == [0, 2]
    assert spool.next_seq == 3
    spool.acknowledge([0, 2, 99])
    spool.close()
    assert not path.exists()


def test_a_file_torn_at_any_byte_keeps_its_whole_records(tmp_path: Path) -> None:
    data = filled(tmp_path / "a.spool")
    for cut in range(len(data)):
        path = tmp_path / f"{cut}.spool"
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends())
        assert held(path) == list(enumerate(PAYLOADS))[:whole]
        assert not path.exists() or path.stat().st_size == ([0, *ends()][whole])


def test_a_torn_file_takes_new_records(tmp_path: Path) -> None:
    path = tmp_path / "a.spool"
    path.write_bytes(filled(path)[:-1])
    spool = Spool(path)
    assert spool.notes
    assert spool.append(2, [b"new"]) == 2
    spool.close()
    assert held(path)[-1] == (2, b"new")


def test_damage_at_any_byte_costs_only_its_record(tmp_path: Path) -> None:
    data = filled(tmp_path / "a.spool")
    last = ends()[-2]
    for position in range(last):
        path = tmp_path / f"{position}.spool"
        bad = bytearray(data)
        bad[position] ^= 0x40
        path.write_bytes(bytes(bad))
        hit = sum(end <= position for end in ends())
        assert held(path) == [pair for pair in enumerate(PAYLOADS) if pair[0] != hit]
        assert path.with_suffix(".quarantined").read_bytes() == bytes(bad)
    spool = Spool(tmp_path / "0.spool")
    spool.close()


def test_damage_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.spool"
    bad = bytearray(filled(path))
    bad[20] ^= 1
    path.write_bytes(bytes(bad))
    spool = Spool(path)
    assert spool.notes == [f"{path}: damaged; kept as a.quarantined, 2 valid records saved"]
    assert spool.next_seq == 3
    spool.close()


def test_the_cap_is_an_error_and_acknowledged_bytes_are_room(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a.spool", limit_bytes=100)
    spool.append(0, [b"x" * 40])
    with pytest.raises(StorageError, match="holds 56 of 100 bytes and cannot take 56 more"):
        spool.append(1, [b"y" * 40])
    spool.append(1, [b"z" * 20])
    spool.acknowledge([0])
    spool.append(2, [b"y" * 40])
    assert list(spool.pending()) == [(1, b"z" * 20), (2, b"y" * 40)]
    spool.close()
    assert held(tmp_path / "a.spool") == [(1, b"z" * 20), (2, b"y" * 40)]


def test_two_processes_cannot_share_a_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a.spool")
    with pytest.raises(RunFolderError, match="another process uses this spool"):
        Spool(tmp_path / "a.spool")
    spool.close()


def test_a_failed_fsync_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def failing(_file: int) -> None:
        calls.append(1)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", failing)
    spool = Spool(tmp_path / "a.spool", durability="power")
    with pytest.raises(StorageError, match="fdatasync failed"):
        spool.append(0, [b"x"])
    assert len(calls) == 1
    spool.close()
