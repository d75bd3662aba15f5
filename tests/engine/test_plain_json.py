"""JSON of a damaged file: a value, or one kind of error, and never more memory than the file is worth."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from slipstream import plain_json


def test_values_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"a": [1, null]}', encoding="utf-8")
    assert plain_json.read(tmp_path / "a") == {"a": [1, None]}


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000])
def test_anything_else_is_a_value_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError):
        plain_json.read(tmp_path / "a")


def test_a_large_file_is_refused_unread_and_a_small_one_takes_little(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"[]")
    tracemalloc.start()
    assert plain_json.read(tmp_path / "a", most_bytes=1 << 30) == []
    with (tmp_path / "a").open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match="expected at most 2097152 bytes of JSON, got 1073741824"):
        plain_json.read(tmp_path / "a")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
