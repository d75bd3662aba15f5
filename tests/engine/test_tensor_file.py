"""A safetensors file is bounded before it is parsed, and holds nothing but what it says."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import checkpoint, tensor_file
from slipstream.errors import CheckpointError

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def written(path: Path, header: Any, data: bytes = bytes(8), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_what_safetensors_writes_is_taken(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    made = {f"layers.{n}.a_b-c": torch.ones((n, 3), dtype=kind) for n, kind in enumerate(kinds)}
    checkpoint.write_tensors(tmp_path / "t", made | {"step": torch.tensor(3.0)})
    read = checkpoint.read_tensors(tmp_path / "t")
    assert all(torch.equal(read[name], tensor) for name, tensor in made.items())
    with_notes = written(tmp_path / "n", {"__metadata__": {"format": "pt"}, "a": ENTRY})
    assert checkpoint.read_tensors(with_notes)["a"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        ({"a": ENTRY | {"dtype": "I64", "shape": [1]}}, "a: expected dtype F64, F32, BF16, F16, got 'I64'"),
        ({"a": ENTRY | {"dtype": "U8", "shape": [8]}}, "a: expected dtype"),
        ({"../a": ENTRY}, "expected names of letters, digits"),
        ({"": ENTRY}, "expected names of letters, digits"),
        ({"a" * 300: ENTRY}, "expected names of letters, digits"),
        ({"a": ENTRY | {"shape": [-1, -2]}}, "a: expected 8 bytes for shape"),
        ({"a": ENTRY | {"shape": [1 << 40, 1 << 40]}}, "expected 4835703278458516698824704 bytes"),
        ({"a": ENTRY | {"shape": [3]}}, "a: expected 12 bytes for shape"),
        ({"a": ENTRY, "b": ENTRY}, "expected 16 bytes of tensors, got 8"),
        ({"a": ENTRY | {"data_offsets": [8, 16]}}, "expected a safetensors file, got damage"),
        ({"a": ENTRY | {"data_offsets": [-8, 0]}}, "a: expected 8 bytes for shape"),
        ({"a": ENTRY | {"extra": 1}}, "expected a safetensors header, got"),
        ({"__metadata__": {"a": 1}}, "expected a safetensors header, got"),
        ({}, "expected 0 bytes of tensors, got 8"),
        ([], "expected a safetensors header, got"),
        (b"", "expected a safetensors header, got"),
        (b"\xff\xfe", "expected a safetensors header, got"),
        (b'{"a": ' + b"[" * 100_000, "got nested lists"),
        (b'{"a": ' + b"[ " * 100_000, "got nested lists"),
        (b'{"a":' * 40_000, "expected at most 32768 tensors, got 40000"),
    ],
)
def test_what_is_wrong_with_a_header_is_named(tmp_path: Path, header: Any, fault: str) -> None:
    path = written(tmp_path / "t", header)
    with pytest.raises(CheckpointError) as raised:
        checkpoint.read_tensors(path)
    assert str(raised.value).startswith(f"{path}: ") and fault in str(raised.value)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 20])
def test_a_cut_file_is_named(tmp_path: Path, size: int) -> None:
    path = written(tmp_path / "t", {"a": ENTRY})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="expected a"):
        checkpoint.read_tensors(path)


def test_a_long_header_is_refused_before_anything_of_it_is_read(tmp_path: Path) -> None:
    """The file is sparse: 100 MB that safetensors would parse, and an absurd length."""
    path = tmp_path / "t"
    with path.open("wb") as file:
        file.truncate(100 << 20)
        file.write(struct.pack("<Q", 99 << 20))
    for length in (99 << 20, 1 << 63, (1 << 64) - 1):
        with path.open("r+b") as file:
            file.write(struct.pack("<Q", length))
        tracemalloc.start()
        with pytest.raises(
            CheckpointError, match=f"expected a header of at most 4194304 bytes, got {length}"
        ):
            tensor_file.check(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_the_most_entries_fit_into_the_memory_of_a_decoder(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path = written(tmp_path / "t", {f"layers.{n}": empty for n in range(tensor_file.MAX_TENSORS)}, b"")
    tracemalloc.start()
    tensor_file.check(path)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
