"""Floor 3. Deltas between two versions of 16-bit weights, by their definition, in NumPy.

The byte format is stated in csrc/include/slipstream.h.

Dimensions: W weights, B bytes of a delta, K blocks, C changed values, P bytes of positions.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slipstream_kernels.checksum import checksum64_reference
from slipstream_kernels.errors import DeltaBaseError, DeltaError

MAGIC: Final = 0x31444C53
FORMAT: Final = 1
BLOCK: Final = 512
_HEADER = struct.Struct("<IHH7Q")
_BITMAP_BYTES, _ESCAPE = 64, 255
_COUNT, _ESCAPE_SHIFT, _BITMAP, _UNUSED = 0x3FF, 10, 0x8000, 0x7000


class Header(NamedTuple):
    """The first 64 bytes of a delta."""

    magic: int
    format: int
    block: int
    values: int
    """W."""
    base_version: int
    new_version: int
    base_checksum: int
    result_checksum: int
    changed: int
    """C."""
    position_bytes: int
    """P."""

    def parts(self) -> tuple[int, int, int, int]:
        """Return the offsets at which entries, positions, values and the trailing checksum begin."""
        positions = _HEADER.size + _padded(2 * -(-self.values // BLOCK))
        values = positions + _padded(self.position_bytes)
        return _HEADER.size, positions, values, values + _padded(2 * self.changed)


def read_header(delta_B: NDArray[np.uint8], size_bytes: int) -> Header:
    """Return the header at the begin of a delta of `size_bytes`. Raises DeltaError."""
    if delta_B.size < _HEADER.size:
        raise DeltaError(f"delta: a delta has at least {_HEADER.size + 8} bytes, got {size_bytes}")
    header = Header(*_HEADER.unpack(delta_B[: _HEADER.size].tobytes()))
    found, expected = (header.magic, header.format, header.block), (MAGIC, FORMAT, BLOCK)
    if found != expected:
        raise DeltaError(f"delta: magic, format and block must be {expected}, got {found}")
    if header.changed > header.values or size_bytes != header.parts()[3] + 8:
        raise DeltaError(f"delta: {size_bytes} bytes are not those of a delta with {header}")
    return header


def encode(
    before_W: NDArray[np.uint16], after_W: NDArray[np.uint16], base_version: int, new_version: int
) -> NDArray[np.uint8]:
    """Return [B], the delta from `before_W` to `after_W`."""
    changed_C = np.flatnonzero(before_W != after_W)
    blocks = -(-before_W.size // BLOCK)
    block_C, place_C = changed_C // BLOCK, changed_C % BLOCK
    first_C = np.concatenate(([True], block_C[1:] != block_C[:-1]))[: changed_C.size]
    gap_C = np.where(first_C, place_C, np.diff(place_C, prepend=0) - 1)
    escape_C = gap_C // _ESCAPE
    count_K = np.bincount(block_C, minlength=blocks)
    escapes_K = np.bincount(block_C, weights=escape_C, minlength=blocks).astype(np.int64)
    bitmap_K = count_K + escapes_K > _BITMAP_BYTES
    entry_K = np.where(bitmap_K, count_K | _BITMAP, count_K | escapes_K << _ESCAPE_SHIFT)
    bytes_K = _position_bytes(entry_K)

    positions_P = np.zeros(int(bytes_K.sum()), np.uint8)
    begin_K = np.cumsum(bytes_K) - bytes_K
    in_bitmap_C = bitmap_K[block_C]
    bit_C = begin_K[block_C[in_bitmap_C]] * 8 + place_C[in_bitmap_C]
    np.bitwise_or.at(positions_P, bit_C // 8, (1 << bit_C % 8).astype(np.uint8))
    gaps = ~in_bitmap_C
    # Each gap is its escapes and one byte more.
    length = escape_C[gaps] + 1
    stream = np.full(int(length.sum()), _ESCAPE, np.uint8)
    stream[np.cumsum(length) - 1] = gap_C[gaps] % _ESCAPE
    positions_P[np.repeat(~bitmap_K, bytes_K)] = stream

    header = Header(
        *(MAGIC, FORMAT, BLOCK, before_W.size, base_version, new_version),
        base_checksum=checksum64_reference(before_W.view(np.uint8)),
        result_checksum=checksum64_reference(after_W.view(np.uint8)),
        changed=changed_C.size,
        position_bytes=positions_P.size,
    )
    parts = (entry_K.astype("<u2").tobytes(), positions_P.tobytes(), after_W[changed_C].tobytes())
    body = _HEADER.pack(*header) + b"".join(part.ljust(_padded(len(part)), b"\0") for part in parts)
    trailer = checksum64_reference(np.frombuffer(body, np.uint8))
    return np.frombuffer(body + struct.pack("<Q", trailer), np.uint8)


def apply(base_W: NDArray[np.uint16], delta_B: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Return [W], the base with the delta's changes. Raises DeltaError, DeltaBaseError."""
    header = read_header(delta_B, delta_B.size)
    entries, positions, values, trailer = header.parts()
    blocks = -(-header.values // BLOCK)
    sealed = int.from_bytes(delta_B[trailer:].tobytes(), "little")
    if header.values != base_W.size or sealed != checksum64_reference(delta_B[:trailer]):
        raise DeltaError(f"delta: the bytes are no whole delta of {base_W.size} values")
    entry_K = delta_B[entries : entries + 2 * blocks].view("<u2").astype(np.int64)
    position_P = delta_B[positions : positions + header.position_bytes]
    changed_C = _changed_values(entry_K, position_P, header)
    if checksum64_reference(base_W.view(np.uint8)) != header.base_checksum:
        raise DeltaBaseError("delta: the base is not the one that the delta was made from")
    result_W = base_W.copy()
    result_W[changed_C] = delta_B[values : values + 2 * header.changed].view("<u2")
    if checksum64_reference(result_W.view(np.uint8)) != header.result_checksum:
        raise DeltaError("delta: the result is not the one that the delta was made for")
    return result_W


def _changed_values(
    entry_K: NDArray[np.int64], position_P: NDArray[np.uint8], header: Header
) -> NDArray[np.int64]:
    """Return [C] sorted indices of the changed values. Raises DeltaError."""
    count_K, escapes_K = entry_K & _COUNT, entry_K >> _ESCAPE_SHIFT & 3
    bitmap_K, bytes_K = (entry_K & _BITMAP) != 0, _position_bytes(entry_K)
    unsound = (entry_K & _UNUSED != 0) | (bytes_K > _BITMAP_BYTES) | (bitmap_K & (escapes_K > 0))
    sums = (int(count_K.sum()), int(bytes_K.sum()))
    if unsound.any() or sums != (header.changed, header.position_bytes):
        raise DeltaError("delta: the entries of its blocks are not sound")
    block_P = np.repeat(np.arange(entry_K.size), bytes_K)
    in_bitmap_P = bitmap_K[block_P]
    bits = np.unpackbits(position_P[in_bitmap_P], bitorder="little").reshape(-1, BLOCK)
    rows, places = bits.nonzero()

    byte, block = position_P[~in_bitmap_P].astype(np.int64), block_P[~in_bitmap_P]
    ends = byte != _ESCAPE
    steps = np.cumsum(byte + ends)
    first = np.searchsorted(block, block, side="left")
    before = np.where(first > 0, steps[first - 1], 0) if block.size else steps
    place = (steps - before - 1)[ends]
    last_of_block = np.append(block[1:] != block[:-1], True)[: block.size]
    found = np.concatenate((block[ends], np.flatnonzero(bitmap_K)[rows]))
    index = np.concatenate((place, places)) + found * BLOCK
    if (
        (np.concatenate((place, places)) >= BLOCK).any()
        or (index >= header.values).any()
        or (np.bincount(found, minlength=entry_K.size) != count_K).any()
        or (last_of_block & ~ends).any()
    ):
        raise DeltaError("delta: the positions of its blocks are not sound")
    return np.sort(index)


def _position_bytes(entry_K: NDArray[np.int64]) -> NDArray[np.int64]:
    gaps_K = (entry_K & _COUNT) + (entry_K >> _ESCAPE_SHIFT & 3)
    return np.where((entry_K & _BITMAP) != 0, _BITMAP_BYTES, gaps_K)


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // 8) * 8
