"""Floor 1. Loads the C++ library of csrc/ through ctypes and turns its status codes into errors.

Pointers and sizes only: tensors and arrays stop at the ops. Each function's contract is in
csrc/include/slipstream.h.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Final, TypeAlias

from slipstream_kernels.errors import BackendUnavailableError, NativeError

LIBRARY = Path(__file__).with_name("libslipstream_cpu.so")
ABI_VERSION = 5

OK: Final = 0
BAD_DELTA: Final = 6
WRONG_BASE: Final = 7
WRONG_RESULT: Final = 8
NOT_FINITE: Final = 10
_STATUS = {
    1: "a pointer is null",
    2: "a size is negative",
    3: "cu_seqlens must begin with 0, never fall and end with the number of tokens",
    4: "the bytes are no plain MessagePack value within the limits",
    5: "the bytes are no whole record of a trajectory",
    6: "the bytes are no whole delta of this many values",
    7: "the base is not the one that the delta was made from",
    8: "the result is not the one that the delta was made for",
    9: "a workspace or an output is too small",
    10: "a weight is not finite",
    11: "an array is not aligned",
    12: "a label lies outside the vocabulary",
}
_POINTER, _I32, _I64, _U64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64
Signatures: TypeAlias = dict[str, list[type]]
_SIGNATURES: Signatures = {
    "slipstream_segment_scan_f32": [_POINTER, _POINTER, _POINTER, _I64, _I64, _I32, _POINTER],
    "slipstream_checksum64": [_POINTER, _I64, _I32, _POINTER],
    "slipstream_seal_trajectory": [_POINTER, _I64, _POINTER],
    "slipstream_check_trajectory": [_POINTER, _I64, _POINTER],
    "slipstream_check_msgpack": [_POINTER, _I64, _I32, _I64],
    "slipstream_delta_plan": [_POINTER, _POINTER, _I64, _U64, _U64, _I32, _POINTER, _I64, _POINTER],
    "slipstream_delta_plan_cast": [_POINTER, _POINTER, _I64, _U64, _U64, _I32, _POINTER, _I64, _POINTER],
    "slipstream_delta_write": [_POINTER, _I64, _I32, _POINTER, _POINTER, _I64],
    "slipstream_delta_apply": [_POINTER, _I64, _POINTER, _I64, _I32, _POINTER],
    "slipstream_fp8_quantize": [_POINTER, _I32, _I64, _I64, _I64, _I64, _I32, _POINTER, _POINTER],
}
_VALUES: Signatures = {
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
    loaded = load(LIBRARY, _SIGNATURES)
    for name, arguments in _VALUES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, ctypes.c_uint32
    return loaded


def load(path: Path, signatures: Signatures) -> ctypes.CDLL:
    """Return a library of csrc/ with the types of its functions that return a status.

    Raises BackendUnavailableError when it cannot be loaded or is of another version.
    """
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailableError(f"the native library cannot be loaded: {error}") from error
    version = int(loaded.slipstream_abi_version())
    if version != ABI_VERSION:
        raise BackendUnavailableError(
            f"the native library {path} has ABI version {version}, expected {ABI_VERSION};"
            " install Slipstream again"
        )
    for name, arguments in signatures.items():
        function = getattr(loaded, name, None)
        if function is None:
            raise BackendUnavailableError(f"the native library {path} lacks {name}; install Slipstream again")
        function.argtypes, function.restype = arguments, ctypes.c_int32
    return loaded


def available() -> bool:
    """Return whether the native library can be used."""
    try:
        library()
    except BackendUnavailableError:
        return False
    return True


def description() -> str:
    """Return one sentence saying whether the native library is there, and if not, why."""
    try:
        library()
    except BackendUnavailableError as error:
        return str(error)
    return f"the native library {LIBRARY.name} is installed"


def segment_scan(
    decay: int, value: int, cu_seqlens: int, *, segments: int, tokens: int, threads: int, output: int
) -> None:
    """Run slipstream_segment_scan_f32 on the addresses of contiguous arrays. Raises NativeError."""
    call("slipstream_segment_scan_f32", decay, value, cu_seqlens, segments, tokens, threads, output)


def checksum64(data: int, *, size_bytes: int, threads: int) -> int:
    """Run slipstream_checksum64 on `size_bytes` bytes at address `data`. Raises NativeError."""
    result = ctypes.c_uint64()
    call("slipstream_checksum64", data, size_bytes, threads, ctypes.byref(result))
    return result.value


def status_of(name: str, *arguments: object) -> int:
    """Run a function of slipstream.h that returns a status, and return it."""
    return int(getattr(library(), name)(*arguments))


def call(name: str, *arguments: object) -> None:
    """Run a function that returns a status. Raises NativeError unless it is OK."""
    if (status := status_of(name, *arguments)) != OK:
        raise NativeError(f"{name}: {reason(status)}")


def reason(status: int) -> str:
    """Return what a status code of the library means."""
    return _STATUS.get(status, f"unknown status {status}")
