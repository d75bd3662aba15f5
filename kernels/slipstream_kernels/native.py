"""Floor 1. Loads the C++ library of csrc/ through ctypes and turns its status codes into errors.

Pointers and sizes only: tensors and arrays stop at the ops. Each function's contract is in
csrc/include/slipstream.h.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from slipstream_kernels.errors import BackendUnavailableError, NativeError

LIBRARY = Path(__file__).with_name("libslipstream_cpu.so")
ABI_VERSION = 4

_STATUS = {
    1: "a pointer is null",
    2: "a size is negative",
    3: "cu_seqlens must begin with 0, never fall and end with the number of tokens",
    4: "the bytes are no plain MessagePack value within the limits",
    5: "the bytes are no whole record of a trajectory",
    6: "a label lies outside the vocabulary",
}
_SIGNATURES: dict[str, list[type]] = {
    "slipstream_segment_scan_f32": [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int32,
        ctypes.c_void_p,
    ],
    "slipstream_checksum64": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p],
    "slipstream_seal_trajectory": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p],
    "slipstream_check_trajectory": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p],
    "slipstream_check_msgpack": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_int64],
}
_VALUES: dict[str, list[type]] = {
    "slipstream_crc32c": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32, ctypes.c_int32],
    "slipstream_crc32c_combine": [ctypes.c_uint32, ctypes.c_uint32, ctypes.c_int64],
}
"""Functions that return a u32 value instead of a status."""


@cache
def library() -> ctypes.CDLL:
    """Return the loaded library. Raises BackendUnavailableError when it is missing or of another version."""
    if not LIBRARY.exists():
        raise BackendUnavailableError(
            f"the native library {LIBRARY.name} is missing, because no C++ compiler was found when Slipstream"
            " was installed; install one (for example g++) and Slipstream again, or use backend 'reference'"
        )
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise BackendUnavailableError(f"the native library cannot be loaded: {error}") from error
    version = int(loaded.slipstream_abi_version())
    if version != ABI_VERSION:
        raise BackendUnavailableError(
            f"the native library {LIBRARY} has ABI version {version}, expected {ABI_VERSION};"
            " install Slipstream again"
        )
    for signatures, result in ((_SIGNATURES, ctypes.c_int32), (_VALUES, ctypes.c_uint32)):
        for name, arguments in signatures.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, result
    return loaded


def available() -> bool:
    """Return whether the native library can be used."""
    return not isinstance(_load(), str)


def description() -> str:
    """Return one sentence saying whether the native library is there, and if not, why."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else f"the native library {LIBRARY.name} is installed"


def segment_scan(
    decay: int, value: int, cu_seqlens: int, *, segments: int, tokens: int, threads: int, output: int
) -> None:
    """Run slipstream_segment_scan_f32 on the addresses of contiguous arrays. Raises NativeError."""
    _call("slipstream_segment_scan_f32", decay, value, cu_seqlens, segments, tokens, threads, output)


def checksum64(data: int, *, size_bytes: int, threads: int) -> int:
    """Run slipstream_checksum64 on `size_bytes` bytes at address `data`. Raises NativeError."""
    result = ctypes.c_uint64()
    _call("slipstream_checksum64", data, size_bytes, threads, ctypes.byref(result))
    return result.value


def reason(status: int) -> str:
    """Return what a status code of the library means."""
    return _STATUS.get(status, f"unknown status {status}")


def _load() -> ctypes.CDLL | str:
    try:
        return library()
    except BackendUnavailableError as error:
        return str(error)


def _call(name: str, *arguments: object) -> None:
    status = getattr(library(), name)(*arguments)
    if status != 0:
        raise NativeError(f"{name}: {reason(status)}")
