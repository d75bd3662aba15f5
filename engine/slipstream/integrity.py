"""Floor 1. Checks of bytes and of a trajectory's arrays: CRC-32C, and the values each array may hold.

The native library does them where it is installed, google-crc32c and NumPy where it is not: same values,
same errors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from slipstream.errors import FrameError
from slipstream.messages import Buffer
from slipstream_kernels.delivery import Address, load

ARRAYS: Final[tuple[tuple[str, np.dtype[Any]], ...]] = (
    ("token_ids", np.dtype("<i4")),
    ("behavior_logprobs", np.dtype("<f4")),
    ("versions", np.dtype("<i4")),
    ("turn_rewards", np.dtype("<f4")),
    ("turns", np.dtype("<i2")),
    ("loss_mask", np.dtype("u1")),
)
"""A trajectory's arrays in the order of its record: turn_rewards [U], the others [T]."""
_CRC_OF_CHECKED: Final = 0x48674BC7
"""That of any bytes and their CRC-32C behind them, little-endian."""
_NATIVE_FROM: Final = 128 << 10
"""Bytes from which the native CRC is faster; below, calling it costs more than it saves."""


def crc32c(frames: Sequence[Buffer], start: int = 0) -> int:
    """Return the CRC-32C (RFC 3720) of some buffers in order; `start`: that of the bytes before them."""
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


def crc32c_of_checked(record: Buffer, start: int = 0) -> int:
    """Return `crc32c([record], start)` of bytes that end in their own CRC-32C, as just verified."""
    native = load()
    return crc32c([record], start) if native is None else native.combine(start, _CRC_OF_CHECKED, len(record))


def address(data: Buffer) -> Address:
    """Return where a contiguous buffer begins, as long as `data` lives."""
    if isinstance(data, bytes):
        return data
    if not len(data):
        return None
    if isinstance(data, memoryview) and data.readonly:
        return int(np.frombuffer(data, np.uint8).ctypes.data)
    # A third of the cost of asking NumPy.
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


def check_values(arrays: Sequence[NDArray[Any]]) -> tuple[int, int, int]:
    """Check the values of a trajectory's six arrays, whose lengths fit.

    Returns the number of sampled tokens and the smallest and largest of their versions, or -1. Raises
    FrameError naming the first field at fault.
    """
    tokens, logprobs, versions, rewards, turns, mask = arrays
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
    return known.size, least, most
