"""Floor 1. What must hold of a safetensors file before any library reads it.

    u64 bytes of the header, little-endian | header (a JSON object) | the tensors' bytes

The header maps each name to its dtype, shape and (begin, end) within the tensors' bytes, and
`__metadata__` to strings. Safetensors checks offsets, but would parse up to 100 MB of header with as many
entries and any dtype; here the header is bounded before it is parsed.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec

from slipstream.errors import CheckpointError

MAX_HEADER_BYTES: Final = 4 << 20
MAX_TENSORS: Final = 1 << 15
ITEM_BYTES: Final = MappingProxyType({"F64": 8, "F32": 4, "BF16": 2, "F16": 2})
"""The dtypes that weights and optimizer state come in."""
BYTES: Final = MappingProxyType({"U8": 1})
"""What the state of a random generator comes in."""
_LENGTH: Final = struct.Struct("<Q")
_METADATA: Final = "__metadata__"
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,256}")
# Only lists of numbers are due, so that nothing nests.
_NESTED: Final = re.compile(rb"\[(?![\d\]-])")


class _Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_HEADER: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TENSOR: Final = msgspec.json.Decoder(_Tensor)
_STRINGS: Final = msgspec.json.Decoder(dict[str, str])


def check(path: Path, *, dtypes: Mapping[str, int] = ITEM_BYTES) -> None:
    """Check the header of a safetensors file against the caps, the dtypes it may have, and the file's size.

    Raises CheckpointError naming the file, what was expected and what was got; OSError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH.size)
        if len(prefix) < _LENGTH.size:
            raise CheckpointError(f"{path}: expected a safetensors file, got {size} bytes")
        (length,) = _LENGTH.unpack(prefix)
        most = min(MAX_HEADER_BYTES, size - _LENGTH.size)
        if length > most:
            raise CheckpointError(f"{path}: expected a header of at most {most} bytes, got {length}")
        header = file.read(length)
    if fault := _fault(header, size - _LENGTH.size - length, dtypes):
        raise CheckpointError(f"{path}: {fault}")


def _fault(header: bytes, data_bytes: int, dtypes: Mapping[str, int]) -> str:
    """Return what is wrong with a header in front of so many bytes, or ""."""
    count = header.count(b"{")
    if count > MAX_TENSORS + 2:
        return f"expected at most {MAX_TENSORS} tensors, got {count}"
    if _NESTED.search(header.translate(None, b" \t\r\n")):
        return "expected a header of names, shapes and offsets, got nested lists"
    try:
        entries = _HEADER.decode(header)
        if _METADATA in entries:
            _STRINGS.decode(entries.pop(_METADATA))
        tensors = {name: _TENSOR.decode(raw) for name, raw in entries.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return f"expected a safetensors header, got {error}"
    total = 0
    for name, tensor in tensors.items():
        if not _NAME.fullmatch(name):
            return f"expected names of letters, digits, dots, dashes and underscores, got {name[:64]!r}"
        item_bytes = dtypes.get(tensor.dtype)
        if item_bytes is None:
            return f"{name}: expected dtype {', '.join(dtypes)}, got {tensor.dtype[:64]!r}"
        begin, end = tensor.data_offsets
        due = item_bytes * math.prod(tensor.shape)
        if min(tensor.shape, default=0) < 0 or begin < 0 or end - begin != due:
            return f"{name}: expected {due} bytes for shape {list(tensor.shape)[:8]}, got {end - begin}"
        total += due
    return "" if total == data_bytes else f"expected {total} bytes of tensors, got {data_bytes}"
