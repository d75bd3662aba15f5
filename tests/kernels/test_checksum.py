"""Checksums: both backends give the same bits, and every byte, place and length counts."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from slipstream_kernels import ShapeError, checksum64, checksum64_named, native

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason=native.description())),
]
MASK = (1 << 64) - 1
GOLDEN = 0x1D5982E19480470B
GOLDEN_NAMED = 0xFFBA1EF4E32EB1E9


def definition(data: bytes) -> int:
    """The checksum in Python integers, word by word."""

    def mix(x: int) -> int:
        for _ in range(2):
            x = ((x ^ (x >> 32)) * 0xD6E8FEB86659FD93) & MASK
        return x ^ (x >> 32)

    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    total = sum(mix((word + (i + 1) * 0x9E3779B97F4A7C15) & MASK) for i, word in enumerate(words))
    return mix((len(data) + total) & MASK)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1023, 1024, 65_537])
def test_equals_the_definition(backend: str, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    assert checksum64(data, backend=backend) == definition(data)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_values(backend: str) -> None:
    # Frozen: weights published by one version of the program are proven by another.
    assert checksum64(b"", backend=backend) == 0
    assert checksum64(b"slipstream", backend=backend) == GOLDEN
    assert checksum64_named({"b": np.arange(3, dtype="<f4"), "a": b"x"}, backend=backend) == GOLDEN_NAMED


@pytest.mark.skipif(not native.available(), reason=native.description())
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_native_equals_reference_past_a_thread_team_and_unaligned(offset: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, (2 << 20) + 5, dtype=np.uint8)[offset:]
    reference = checksum64(data, backend="reference")
    assert {checksum64(data, backend="native", threads=threads) for threads in (0, 1, 2, 3)} == {reference}


def test_every_kind_of_data_counts_by_its_bytes() -> None:
    tensor = torch.randn(6, 4)
    expected = checksum64(tensor.numpy().tobytes())
    assert checksum64(tensor) == expected
    assert checksum64(tensor.clone().requires_grad_()) == expected
    assert checksum64(tensor.numpy()) == expected
    assert checksum64(tensor.T) == checksum64(tensor.T.contiguous()) != expected
    assert checksum64(tensor.numpy()[:, ::2]) == checksum64(tensor[:, ::2])
    half = tensor.bfloat16()
    assert checksum64(half) == checksum64(half.view(torch.int16))
    assert checksum64(torch.tensor(1.5)) == checksum64(np.float32(1.5).tobytes())
    assert checksum64(torch.empty(0, 3)) == checksum64(b"")


def test_bytes_places_and_length_all_count() -> None:
    data = bytes(range(64))
    swapped = data[8:16] + data[:8] + data[16:]
    flips = [bytes([*data[:i], data[i] ^ 1, *data[i + 1 :]]) for i in range(64)]
    variants = [data, swapped, data + b"\0", data[:-1], *flips]
    assert len({checksum64(variant) for variant in variants}) == len(variants)


def test_named_depends_on_names_and_bytes_but_not_on_order() -> None:
    one, two = np.ones(3), np.zeros(3)
    both = checksum64_named({"a": one, "b": two})
    assert checksum64_named({"b": two, "a": one}) == both
    assert checksum64_named({"a": two, "b": one}) != both
    assert checksum64_named({"a": one, "c": two}) != both
    assert checksum64_named({"a": one}) != both


def test_refuses_what_has_no_bytes() -> None:
    with pytest.raises(ShapeError, match="must be an array, a tensor or bytes, got list"):
        checksum64([1, 2])  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="must hold numbers or bytes, got dtype object"):
        checksum64(np.array([object()]))


def test_arrays_need_no_torch() -> None:
    code = (
        "import sys, numpy, slipstream_kernels as k;"
        "print(k.checksum64(numpy.arange(3)), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == [str(checksum64(np.arange(3))), "False"]
