"""What a trajectory is, read without the product's own readers: its content has one key, whoever carries it.

An actor writes down, before it hands a record to its spool and after the spool has promised to keep it,
    < key      about to be made durable
    > key      durable
in a file of its own. All trajectories of the rig are different: `note` holds who made it, and a number.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import msgpack

from slipstream.messages import Buffer
from slipstream.spool import Spool

_LENGTHS = struct.Struct("<8I")
_HEAD = struct.Struct("<IIQ")
_SEQ = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Content:
    """A record's content, without the identity under which it travelled."""

    key: str
    maker: str
    """Whose spool it was made in."""
    header: dict[str, Any]
    serials: frozenset[int]


def content_of(record: Buffer) -> Content:
    """Return the content of a record (wire.py) as its bytes say, unchecked."""
    lengths = _LENGTHS.unpack_from(record)
    ends = [_LENGTHS.size]
    for length in lengths:
        ends.append(ends[-1] + length)
    header = msgpack.unpackb(record[ends[6] : ends[7]])
    digest = hashlib.blake2b(bytes(record[_LENGTHS.size : ends[6]]), digest_size=10)
    told = header["note"], sorted(header["attempt"].items()), header["evaluation"], header["issue"]
    digest.update(repr(told).encode())
    versions = struct.unpack_from(f"<{lengths[2] // 4}i", record, ends[2])
    return Content(digest.hexdigest(), header["note"].split("#")[0], header, frozenset(versions) - {-1})


def read_log(folder: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield (event, record) of the log of a hub that came to its own end; raises when something is wrong."""
    expected = 0
    for path in sorted(folder.glob("*.log")):
        data, position = path.read_bytes(), 0
        while position < len(data):
            assert position + _HEAD.size <= len(data), f"{path}: torn at {position}"
            length, check, seq = _HEAD.unpack_from(data, position)
            payload = data[position + _HEAD.size : position + _HEAD.size + length]
            right = len(payload) == length and google_crc32c.value(_SEQ.pack(seq) + payload) == check
            assert right, f"{path}: damaged at {position}"
            assert seq == expected, f"{path}: event {seq} stands where {expected} belongs"
            expected += 1
            (split,) = struct.unpack_from("<I", payload)
            yield msgpack.unpackb(payload[4 : 4 + split], strict_map_key=False), payload[4 + split :]
            position += _HEAD.size + length


class WitnessedSpool(Spool):
    """A spool that lets an oracle know what it has promised to keep."""

    def __init__(self, path: Path, oracle: Path, **options: Any) -> None:
        """Open both."""
        super().__init__(path, **options)
        self._oracle = os.open(oracle, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._keys: list[str] = []

    def write(self, seq: int, record: Buffer) -> int:
        """Write down what is about to be made durable, then do it."""
        key = content_of(record).key
        os.write(self._oracle, f"< {key}\n".encode())
        super().write(seq, record)
        if self.must_sync:
            self._keys.append(key)
        else:
            os.write(self._oracle, f"> {key}\n".encode())
        return seq

    def sync(self) -> None:
        """Do it, then write down what is durable now; another thread may write meanwhile."""
        keys, self._keys = self._keys, []
        super().sync()
        os.write(self._oracle, "".join(f"> {key}\n" for key in keys).encode())


def read_oracle(path: Path) -> tuple[set[str], set[str]]:
    """Return the keys that were begun, and those that were promised."""
    begun, promised = set[str](), set[str]()
    for line in path.read_text().splitlines():
        (begun if line[0] == "<" else promised).add(line[2:])
    return begun, promised


def sessions(path: Path) -> dict[str, str]:
    """Return session -> spool of all processes that were started, as `note_session` wrote them."""
    return dict(line.split() for line in path.read_text().splitlines()) if path.exists() else {}


def note_session(path: Path, session: str, spool: str) -> None:
    """Write down whose session this is."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(file, f"{session} {spool}\n".encode())
    os.close(file)
