"""Floor 1. Checks that every trajectory passes at both ends: CRC-32C, and the values of its arrays.

The native library does them where it is installed, google-crc32c and NumPy where it is not: same values,
same errors.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from slipstream.errors import FrameError
from slipstream.messages import Buffer
from slipstream_kernels.delivery import Address, Summary, load

ARRAYS: Final[tuple[tuple[str, np.dtype[Any]], ...]] = (
    ("token_ids", np.dtype("<i4")),
    ("loss_mask", np.dtype("u1")),
    ("behavior_logprobs", np.dtype("<f4")),
    ("versions", np.dtype("<i4")),
    ("turns", np.dtype("<i2")),
    ("turn_rewards", np.dtype("<f4")),
)
"""A trajectory's arrays in the order of their frames: [T] each, the last [U]."""
_U32: Final = struct.Struct("<I")
_NATIVE_FROM: Final = 128 << 10
"""Bytes from which the native CRC is faster; below, calling it costs more than it saves."""


def crc32c(frames: Sequence[Buffer], start: int = 0) -> int:
    """Return the CRC-32C of some buffers in order, continuing from `start`."""
    total, native = start, load()
    for frame in frames:
        size = len(frame)
        if native is not None and size >= _NATIVE_FROM:
            total = native.crc32c(address(frame), size, total)
        elif size:
            # google_crc32c reads arrays and bytes, but refuses a memoryview.
            data = frame if isinstance(frame, bytes) else np.frombuffer(frame, np.uint8)
            total = google_crc32c.extend(total, data)
    return total


def crc32c_of_checked(frames: Sequence[Buffer], start: int = 0) -> int:
    """Return `crc32c(frames, start)` of frames whose last is the CRC-32C of the others, as just verified.

    Only the last one is read.
    """
    native = load()
    if native is None:
        return crc32c(frames, start)
    (known,) = _U32.unpack(frames[-1])
    return crc32c(frames[-1:], native.combine(start, known, sum(map(len, frames)) - _U32.size))


def address(data: Buffer | NDArray[Any]) -> Address:
    """Return where a contiguous buffer begins, as long as `data` lives."""
    if isinstance(data, bytes):
        return data
    array = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    return int(array.ctypes.data)


def check_values(parts: Sequence[Buffer | NDArray[Any]]) -> Summary:
    """Check the values of a trajectory's six arrays, or of their bytes, and return what was counted.

    Their lengths must fit. Raises FrameError naming the first field at fault.
    """
    native = load()
    if native is not None:
        length, reward_count = _elements(parts[0], 4), _elements(parts[5], 4)
        found = native.check_trajectory(*map(address, parts), length=length, reward_count=reward_count)
        if not found.fault:
            return found
    typed = zip(parts, ARRAYS, strict=True)
    return check_values_in_numpy(*(np.frombuffer(part, dtype) for part, (_, dtype) in typed))


def _elements(part: Buffer | NDArray[Any], item_bytes: int) -> int:
    return part.size if isinstance(part, np.ndarray) else len(part) // item_bytes


def check_values_in_numpy(
    tokens: NDArray[np.int32], mask: NDArray[np.uint8], logprobs: NDArray[np.float32],
    versions: NDArray[np.int32], turns: NDArray[np.int16], rewards: NDArray[np.float32],
) -> Summary:  # fmt: skip
    """Do what `check_values` does, without the native library."""
    if np.maximum.reduce(mask, initial=0) > 1:
        raise FrameError(f"loss_mask: expected 0 or 1, got {mask.max()}")
    for name, array in (("behavior_logprobs", logprobs), ("turn_rewards", rewards)):
        if not np.isfinite(array).all():
            raise FrameError(f"{name}: expected finite values, got NaN or infinity")
    if np.minimum.reduce(tokens, initial=0) < 0:
        raise FrameError(f"token_ids: expected values >= 0, got {tokens.min()}")
    absent = mask == 0
    if ((versions < 0) != absent).any():
        raise FrameError(
            "versions: expected a serial where loss_mask is 1 and -1 elsewhere, got another pattern"
        )
    count = rewards.size
    if ((turns < 0) != absent).any() or np.maximum.reduce(turns, initial=-1) >= max(count, 1):
        raise FrameError(f"turns: expected 0 .. {count - 1} where loss_mask is 1 and -1 elsewhere")
    known = versions[~absent]
    least, most = (int(known.min()), int(known.max())) if known.size else (-1, -1)
    return Summary("", known.size, least, most)
