"""Floor 1. Loads the CUDA library of csrc/ through ctypes; imports neither torch nor NumPy.

Addresses are those of arrays on the current device, and every function takes a stream. Each function's
contract is in csrc/include/slipstream.h.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from slipstream_kernels import native
from slipstream_kernels.errors import BackendUnavailableError, NativeError

LIBRARY = Path(__file__).with_name("libslipstream_cuda.so")

_POINTER, _I32, _I64, _U64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64
_PLAN: list[type] = [_POINTER, _POINTER, _I64, _U64, _U64, _POINTER, _I64, _POINTER, _POINTER]
_SIGNATURES: native.Signatures = {
    "slipstream_cuda_device_count": [_POINTER],
    "slipstream_cuda_segment_scan_f32": [
        *(_POINTER, _POINTER, _POINTER, _I64, _I64),
        *(_POINTER, _I64, _POINTER, _POINTER),
    ],
    "slipstream_cuda_estimate_f32": [_POINTER, _POINTER, _POINTER, _I64, _POINTER, _POINTER, _POINTER],
    "slipstream_cuda_checksum64": [_POINTER, _I64, _POINTER, _POINTER],
    "slipstream_cuda_delta_plan": _PLAN,
    "slipstream_cuda_delta_plan_cast": _PLAN,
    "slipstream_cuda_delta_write": [_POINTER, _I64, _POINTER, _POINTER, _I64, _POINTER],
    "slipstream_cuda_delta_apply": [
        *(_POINTER, _I64, _POINTER, _I64, _POINTER, _I64),
        *(_POINTER, _POINTER, _POINTER),
    ],
    "slipstream_cuda_fp8_quantize": [_POINTER, _I32, _I64, _I64, _POINTER, _POINTER, _POINTER, _POINTER],
}


@cache
def library() -> ctypes.CDLL:
    """Return the loaded library, on a machine that can use it.

    Raises BackendUnavailableError when it is missing, of another version, or finds no device.
    """
    if not LIBRARY.exists():
        raise BackendUnavailableError(
            f"the CUDA library {LIBRARY.name} is missing, because nvcc was not found, or failed, when"
            " Slipstream was installed; install the CUDA toolkit and Slipstream again, or use another backend"
        )
    loaded = native.load(LIBRARY, _SIGNATURES)
    loaded.slipstream_cuda_error.argtypes = [_I32]
    loaded.slipstream_cuda_error.restype = ctypes.c_char_p
    count = ctypes.c_int32()
    status = int(loaded.slipstream_cuda_device_count(ctypes.byref(count)))
    if status != native.OK or count.value == 0:
        found = _reason(loaded, status) if status != native.OK else "no device is visible"
        raise BackendUnavailableError(f"the CUDA library {LIBRARY.name} finds no GPU to run on: {found}")
    return loaded


def available() -> bool:
    """Return whether the CUDA library can be used."""
    return not isinstance(_load(), str)


def description() -> str:
    """Return one sentence saying whether the CUDA library can be used, and if not, why."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else f"the CUDA library {LIBRARY.name} is installed"


def call(name: str, *arguments: object) -> None:
    """Queue a function of slipstream.h on its stream. Raises NativeError unless its status is OK."""
    loaded = library()
    status = int(getattr(loaded, name)(*arguments))
    if status != native.OK:
        raise NativeError(f"{name}: {_reason(loaded, status)}")


def _reason(loaded: ctypes.CDLL, status: int) -> str:
    if status > 0:
        return native.reason(status)
    text: bytes = loaded.slipstream_cuda_error(status)
    return f"CUDA error {-status}, {text.decode()}"


def _load() -> ctypes.CDLL | str:
    try:
        return library()
    except BackendUnavailableError as error:
        return str(error)
