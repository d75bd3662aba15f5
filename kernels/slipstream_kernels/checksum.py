"""Floor 3. 64-bit checksums of raw bytes, for arrays and tensors; torch is imported only for its tensors.

The bytes are read as little-endian 64-bit words w_0 .. w_{n-1}, the last one padded with zero
bytes. Modulo 2^64:

    mix(x):  x ^= x >> 32;  x *= 0xd6e8feb86659fd93;  x ^= x >> 32;  x *= 0xd6e8feb86659fd93;  x ^=
    x >> 32 checksum64 = mix(size_bytes + sum over i of mix(w_i + (i + 1) * 0x9e3779b97f4a7c15))

It detects corruption and mistaken identity; it does not resist a forger. Shape and type are not
part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from slipstream_kernels import native, native_cuda
from slipstream_kernels.dispatch import Backend, choose
from slipstream_kernels.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor

    ArrayLike: TypeAlias = "Tensor | NDArray[Any] | bytes"

IMPLEMENTED = (Backend.CUDA, Backend.NATIVE, Backend.REFERENCE)
CHUNK_WORDS = 1 << 16
"""Words the reference mixes at once, so that its temporaries stay in the cache."""
_STRIDE = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)


def checksum64(data: ArrayLike, *, threads: int = 1, backend: Backend | str | None = None) -> int:
    """Return the checksum of the bytes of an array, tensor or byte string, in [0, 2^64).

    Non-contiguous data counts as its C-contiguous copy. A CUDA tensor stays on its device with
    backend "cuda", which None takes where it is available; otherwise its copy on the CPU is read.
    Every backend gives the same number, whatever `threads` (of the native backend). Raises ShapeError
    and BackendError.
    """
    device = getattr(getattr(data, "device", None), "type", "cpu")
    stays = device == "cuda" and (backend == Backend.CUDA or (backend is None and native_cuda.available()))
    chosen = choose("checksum64", backend, implemented=IMPLEMENTED, device="cuda" if stays else "cpu")
    if chosen is Backend.CUDA:
        return _on_device(cast("Tensor", data))
    raw = _bytes_of(data)
    if chosen is Backend.NATIVE:
        return native.checksum64(raw.ctypes.data, size_bytes=raw.size, threads=threads)
    return checksum64_reference(raw)


def checksum64_named(
    arrays: Mapping[str, ArrayLike], *, threads: int = 1, backend: Backend | str | None = None
) -> int:
    """Return one checksum of named arrays, in the order of their names.

        checksum64 of the little-endian words  checksum64(name_0), checksum64(array_0),
        checksum64(name_1), ...

    with names in UTF-8 and sorted by code point: it depends on names and bytes, not on the
    mapping's order.
    """
    words: list[int] = []
    for name in sorted(arrays):
        words.append(checksum64(name.encode(), backend=backend))
        words.append(checksum64(arrays[name], threads=threads, backend=backend))
    return checksum64(np.array(words, dtype="<u8"), backend=backend)


def checksum64_reference(raw: NDArray[np.uint8]) -> int:
    """Return the checksum of contiguous bytes by its definition, in NumPy."""
    padded = raw if raw.size % 8 == 0 else np.pad(raw, (0, 8 - raw.size % 8))
    # A copy where the buffer is unaligned; NumPy reads unaligned words, but slowly.
    words = padded.view("<u8").astype(np.uint64, copy=False)
    total = raw.size
    for start in range(0, words.size, CHUNK_WORDS):
        chunk = words[start : start + CHUNK_WORDS]
        index = np.arange(start + 1, start + 1 + chunk.size, dtype=np.uint64)
        total += int(_mix(chunk + index * _STRIDE).sum(dtype=np.uint64))
    return int(_mix(np.array([total % (1 << 64)], dtype=np.uint64))[0])


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for _ in range(2):
        x = (x ^ (x >> _HALF)) * _MULTIPLIER
    return x ^ (x >> _HALF)


def _on_device(tensor: Tensor) -> int:
    """Return the checksum of a CUDA tensor; one number crosses to the host."""
    import torch

    flat = tensor.detach().contiguous()
    with torch.cuda.device(flat.device):
        result = torch.empty(1, dtype=torch.int64, device=flat.device)
        stream = torch.cuda.current_stream().cuda_stream
        size_bytes = flat.numel() * flat.element_size()
        native_cuda.call("slipstream_cuda_checksum64", flat.data_ptr(), size_bytes, result.data_ptr(), stream)
        return int(result) % (1 << 64)


def _bytes_of(data: ArrayLike) -> NDArray[np.uint8]:
    """Return a flat uint8 view of the data, or of a contiguous copy."""
    if isinstance(data, bytes | bytearray | memoryview):
        return np.frombuffer(data, dtype=np.uint8)
    if isinstance(data, np.ndarray):
        if data.dtype.hasobject:
            raise ShapeError(f"checksum64: data must hold numbers or bytes, got dtype {data.dtype}")
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    if not hasattr(data, "untyped_storage"):
        raise ShapeError(f"checksum64: data must be an array, a tensor or bytes, got {type(data).__name__}")
    # Its own dtype may be one NumPy lacks (bfloat16), so it crosses over as bytes.
    from torch import uint8

    flat = data.detach().to("cpu").contiguous().reshape(-1).view(uint8)
    result: NDArray[np.uint8] = flat.numpy()
    return result
