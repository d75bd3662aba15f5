"""Mutations that know a little of the formats: flips, cuts, splices, lengths, type bytes, right checksums.

Everything is drawn from one seeded generator, so that a seed gives the same inputs again.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

import google_crc32c

from slipstream.wire import ARRAYS

Mutate = Callable[[], bytes]
PARTS = len(ARRAYS) + 2

# Type bytes of MessagePack (containers, sized, extensions, reserved), ends of ranges, JSON's brackets.
BYTES = (
    bytes.fromhex("00017f80818f90919fa0bfc0c1c2c3c4c5c6c7c8c9cacbcccfd0d3d4d8d9dadbdcdddedfe0ff")
    + b'[]{}",:-.\\eE'
)
NUMBERS = (0, 1, 2, 3, 4, 15, 16, 31, 63, 127, 128, 255, 256, 4095, 32767, 32768, 65535, 65536, 1 << 20,
           (1 << 24) - 1, 1 << 30, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)  # fmt: skip
FLOATS = tuple(
    struct.unpack("<I", struct.pack("<f", value))[0]
    for value in (float("nan"), float("inf"), -float("inf"), -0.0, 1e30, 3e38, 1e-45)
)


def mutations(samples: Sequence[bytes], seed: int | str) -> Mutate:
    """Return a function that gives another mutated sample with each call."""
    bits, count = random.Random(seed).getrandbits, len(samples)

    def mutate() -> bytes:
        drawn = bits(64)
        data = bytearray(samples[drawn % count])
        drawn >>= 16
        for _ in range(1 + (drawn & 3 if drawn & 4 else 0)):
            _change(data, drawn >> 3, samples)
            drawn = bits(64)
        return bytes(data)

    return mutate


def _change(data: bytearray, drawn: int, samples: Sequence[bytes]) -> None:
    """Change `data` in place by one of ten operations; `drawn` holds at least 45 random bits."""
    size = len(data)
    kind, place = drawn & 15, (drawn >> 4) % (size + 1)
    extra = drawn >> 24
    if size == 0 or kind == 9:
        data[place:place] = bytes((BYTES[extra % len(BYTES)],)) * (1 + (extra >> 8 & 7))
    elif kind <= 1:
        data[place % size] ^= 1 << (extra & 7)
    elif kind <= 4:
        data[place % size] = BYTES[extra % len(BYTES)]
    elif kind == 5:
        del data[place:]
    elif kind == 6:
        del data[place : place + 1 + (extra & 15)]
    elif kind == 7:
        order = "big" if extra & 1 else "little"
        width = (1, 2, 4, 8)[extra >> 1 & 3]
        number = NUMBERS[(extra >> 3) % len(NUMBERS)] & ((1 << 8 * width) - 1)
        data[place : place + width] = number.to_bytes(width, order)
    elif kind == 8:
        data[place:place] = data[place : place + (extra & 63)]
    elif kind <= 11:
        other = samples[extra % len(samples)]
        start = (extra >> 4) % (len(other) + 1)
        data[place:] = other[start:]
    elif kind <= 13:
        data[place : place + 4] = FLOATS[extra % len(FLOATS)].to_bytes(4, "little")
    else:
        data[place % size] = extra & 255


def record_mutations(samples: Sequence[bytes], seed: int | str) -> Mutate:
    """Return a function that gives mutated trajectory records, most of them with a right CRC-32C again.

    One in four changes the length of a part: alone, at the cost of another part, or with the zeros that it
    then needs, so that the whole still adds up.
    """
    random_ = random.Random(f"{seed}/lengths")
    bits, plain, count = random_.getrandbits, mutations(samples, seed), len(samples)

    def mutate() -> bytes:
        drawn = bits(32)
        if drawn & 3:
            data = bytearray(plain())
        else:
            data = bytearray(samples[(drawn >> 8) % count])
            number = NUMBERS[bits(8) % len(NUMBERS)]
            if drawn & 0x80:
                _grow(data, drawn >> 2, number)
            else:
                _move_lengths(data, drawn >> 2, number)
        if drawn & 0x1C and len(data) >= 4:
            del data[-4:]
            data += google_crc32c.value(bytes(data)).to_bytes(4, "little")
        return bytes(data)

    return mutate


def _grow(data: bytearray, drawn: int, number: int) -> None:
    lengths = list(struct.unpack_from(f"<{PARTS}I", data))
    part, zeros = (drawn >> 1) % PARTS, min(number, 1 << 10)
    end = 4 * PARTS + sum(lengths[: part + 1])
    lengths[part] += zeros
    data[end:end] = bytes(zeros)
    struct.pack_into(f"<{PARTS}I", data, 0, *lengths)


def _move_lengths(data: bytearray, drawn: int, number: int) -> None:
    lengths = list(struct.unpack_from(f"<{PARTS}I", data))
    one, other = (drawn >> 1) % PARTS, (drawn >> 4) % PARTS
    moved = min(lengths[other], number) if drawn & 1 else number
    lengths[one] = (lengths[one] + moved) & 0xFFFFFFFF
    if drawn & 1:
        lengths[other] -= min(moved, lengths[other])
    struct.pack_into(f"<{PARTS}I", data, 0, *lengths)
