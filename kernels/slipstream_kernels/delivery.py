"""Floor 1. What the delivery of trajectories needs of the native library; imports neither torch nor NumPy.

Addresses are integers, or byte strings, whose first byte is meant.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import NamedTuple, TypeAlias

from slipstream_kernels import native
from slipstream_kernels.errors import NativeError

Address: TypeAlias = "int | bytes | None"


class Summary(NamedTuple):
    """What a sound record holds (slipstream_check_trajectory)."""

    sampled: int
    """Tokens whose mask is 1."""
    least: int
    """Smallest version of a sampled token, or -1."""
    most: int
    """Largest version of a sampled token, or -1."""
    tokens: int
    turns: int
    header_bytes: int
    call_bytes: int


_FoundBySeal = ctypes.c_int64 * 4
_FoundByCheck = ctypes.c_int64 * 8
_NUMBERS = struct.Struct("=8q")


class Delivery:
    """The functions of csrc/include/slipstream.h that a trajectory meets on its way.

    Example: ``delivery = load(); crc = delivery.crc32c(b"abc", 3, 0) if delivery else None``.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        """Bind the functions of a loaded library."""
        self._crc32c, self._combine = library.slipstream_crc32c, library.slipstream_crc32c_combine
        self._seal, self._check = library.slipstream_seal_trajectory, library.slipstream_check_trajectory
        self._check_msgpack = library.slipstream_check_msgpack

    def crc32c(self, data: Address, size_bytes: int, start: int = 0, *, portable: bool = False) -> int:
        """Return the CRC-32C of some bytes, continuing from `start`; `portable` avoids the instruction."""
        return int(self._crc32c(data, size_bytes, start, portable))

    def combine(self, first: int, second: int, second_bytes: int) -> int:
        """Return the CRC-32C of two blocks in a row from those of each."""
        return int(self._combine(first, second, second_bytes))

    def seal(self, record: Address, size_bytes: int) -> bool:
        """Write the CRC-32C of a record that is whole but for it; False when its arrays are not sound.

        Raises NativeError.
        """
        found = _FoundBySeal()
        status = self._seal(record, size_bytes, found)
        if status != 0:
            raise NativeError(f"slipstream_seal_trajectory: {native.reason(status)}")
        return bool(found[0] == 0)

    def check(self, record: Address, size_bytes: int) -> Summary | None:
        """Return what a record holds, or None when it is cut off, changed or not sound."""
        found = _FoundByCheck()
        if self._check(record, size_bytes, found) != 0:
            return None
        fault, *numbers = _NUMBERS.unpack(found)
        return None if fault else Summary(*numbers)

    def is_plain_msgpack(self, data: bytes, *, most_depth: int, most_items: int) -> bool:
        """Return whether `data` is one MessagePack value within these limits, without extension types."""
        return int(self._check_msgpack(data, len(data), most_depth, most_items)) == 0


@cache
def load() -> Delivery | None:
    """Return the native functions, or None where the library cannot be used (`native.description`)."""
    return Delivery(native.library()) if native.available() else None
