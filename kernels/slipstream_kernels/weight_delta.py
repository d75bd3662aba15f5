"""Floor 4. Deltas between two versions of 16-bit weights: what changed, some 30 times smaller than they are.

A step of an optimizer changes 1 to 3 % of bfloat16 weights. For each block of 512 values a delta holds the
positions of the changed ones, as gaps of one byte or as a bitmap of 64 bytes, whichever is smaller, and
their new values. Checksums name the base it was made from, the result, and its own bytes; the byte format is
stated in csrc/include/slipstream.h.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slipstream_kernels import native, native_cuda
from slipstream_kernels.checks import check_shape
from slipstream_kernels.dispatch import Backend, choose
from slipstream_kernels.errors import DeltaBaseError, DeltaError, NativeError, ShapeError
from slipstream_kernels.reference import weight_delta as reference

IMPLEMENTED = (Backend.CUDA, Backend.NATIVE, Backend.REFERENCE)
HEADER_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Delta:
    """What turns one version of a tensor into another.

    Example: ``sent = delta_encode(old, new).to_bytes(); new = delta_apply(old, Delta.from_bytes(sent))``.
    """

    data: Tensor
    """[B] uint8, contiguous: the bytes as they are stored and sent."""
    count: int
    """Values of the tensor."""
    changed: int
    """Values that differ."""
    base_version: int
    new_version: int
    base_checksum: int
    """checksum64 of the tensor it is applied to."""
    result_checksum: int
    """checksum64 of the tensor it gives."""

    @staticmethod
    def of(data: Tensor) -> Delta:
        """Return the delta in `data`, [B] uint8, of which only the header is read. Raises DeltaError."""
        if data.dtype is not torch.uint8 or data.ndim != 1:
            raise DeltaError(f"delta: data must be [B] uint8, got {list(data.shape)} {data.dtype}")
        header = reference.read_header(data[:HEADER_BYTES].cpu().numpy(), data.numel())
        return Delta(
            data=data.contiguous(),
            count=header.values,
            changed=header.changed,
            base_version=header.base_version,
            new_version=header.new_version,
            base_checksum=header.base_checksum,
            result_checksum=header.result_checksum,
        )

    @staticmethod
    def from_bytes(data: bytes | bytearray | memoryview) -> Delta:
        """Return the delta that these bytes hold, in a copy. Raises DeltaError."""
        return Delta.of(torch.from_numpy(np.frombuffer(data, np.uint8).copy()))

    def to_bytes(self) -> bytes:
        """Return the bytes as they are stored and sent."""
        return self.data.cpu().numpy().tobytes()


@torch.no_grad()
def delta_encode(
    old: Tensor,
    new: Tensor,
    *,
    base_version: int = 0,
    new_version: int = 0,
    threads: int | None = None,
    backend: Backend | str | None = None,
) -> Delta:
    """Return what turns `old` into `new`, bit by bit.

    old, new: any shape, the same for both, of a type of 2 bytes; base_version, new_version: in
    [0, 2^64), carried along; threads: of the native backend, PyTorch's number unless given. The delta lies
    on their device. Every backend gives the same bytes.
    Raises ShapeError and BackendError.
    """
    op = "delta_encode"
    _check_weights(op, "old", old)
    check_shape(op, "new", new, tuple(old.shape))
    if new.dtype is not old.dtype or new.device != old.device:
        raise ShapeError(f"{op}: new must be {old.dtype} on {old.device}, got {new.dtype} on {new.device}")
    _check_versions(op, base_version, new_version)
    before, after = old.contiguous(), new.contiguous()
    chosen = choose(op, backend, implemented=IMPLEMENTED, device=old.device.type)
    if chosen is Backend.REFERENCE:
        made = reference.encode(_words(before), _words(after), base_version, new_version)
        return Delta.of(torch.from_numpy(made.copy()).to(old.device))
    versions = base_version, new_version
    return _encode(chosen, "delta_plan", _aligned(before), _aligned(after), versions, threads)


@torch.no_grad()
def delta_encode_cast(
    master: Tensor,
    weights: Tensor,
    *,
    base_version: int = 0,
    new_version: int = 0,
    backend: Backend | str | None = None,
) -> Delta:
    """Round `master` to bfloat16 into `weights`, and return what that changed.

    One sweep after the optimizer's step, while the old weights are still in place: no copy of them is
    kept. master: float32, rounded to nearest even (NaN becomes 0x7fc0); weights: bfloat16, contiguous,
    of the same shape, overwritten; on a GPU also 16-byte aligned. Otherwise as delta_encode. Raises
    ShapeError and BackendError.
    """
    op = "delta_encode_cast"
    if master.dtype is not torch.float32 or weights.dtype is not torch.bfloat16:
        got = f"{master.dtype} and {weights.dtype}"
        raise ShapeError(f"{op}: master must be float32 and weights bfloat16, got {got}")
    check_shape(op, "master", master, tuple(weights.shape))
    if not weights.is_contiguous() or master.device != weights.device:
        raise ShapeError(f"{op}: weights must be contiguous and on {master.device}, got {weights.device}")
    _check_versions(op, base_version, new_version)
    chosen = choose(op, backend, implemented=IMPLEMENTED, device=weights.device.type)
    if chosen is Backend.REFERENCE:
        old = weights.clone()
        weights.copy_(torch.where(master.isnan(), torch.nan, master.to(torch.bfloat16)))
        weights.view(torch.int16).masked_fill_(master.isnan(), 0x7FC0)
        made = reference.encode(_words(old), _words(weights), base_version, new_version)
        return Delta.of(torch.from_numpy(made.copy()).to(weights.device))
    return _encode(
        chosen, "delta_plan_cast", _aligned(master.contiguous()), weights, (base_version, new_version)
    )


@torch.no_grad()
def delta_apply(
    base: Tensor,
    delta: Delta,
    *,
    in_place: bool = False,
    threads: int | None = None,
    backend: Backend | str | None = None,
) -> Tensor:
    """Return `base` with the changes of `delta`: the tensor that it was made for, bit by bit.

    base: any shape, of a type of 2 bytes; in_place: changes `base` itself, which must be contiguous;
    threads: of the native backend, PyTorch's number unless given.
    All is checked before anything is written: raises DeltaError when the bytes are damaged or not of
    as many values, DeltaBaseError when `base` is not what the delta was made from. A forged delta, with
    right checksums of its bytes and base, raises DeltaError for its result, and has then changed an
    `in_place` base. Also raises ShapeError and BackendError.
    """
    op = "delta_apply"
    _check_weights(op, "base", base)
    if in_place and not base.is_contiguous():
        raise ShapeError(f"{op}: base must be contiguous to be changed in place, got strides {base.stride()}")
    if delta.count != base.numel():
        raise DeltaError(f"{op}: delta must hold {base.numel()} values, as base does, got {delta.count}")
    chosen = choose(op, backend, implemented=IMPLEMENTED, device=base.device.type)
    before, data = base.contiguous(), _aligned(delta.data.to(base.device))
    before = before if in_place else _aligned(before)
    output = before if in_place else torch.empty_like(before)
    if chosen is Backend.REFERENCE:
        made = reference.apply(_words(before), data.cpu().numpy())
        return (
            output.view(torch.int16)
            .copy_(torch.from_numpy(made.view(np.int16)).view(base.shape))
            .view(base.dtype)
        )
    match _apply(chosen, before, data, output, threads):
        case native.OK:
            return output
        case native.WRONG_BASE:
            raise DeltaBaseError(
                f"{op}: base must be version {delta.base_version} with checksum64"
                f" {delta.base_checksum:#018x}, got other weights"
            )
        case native.BAD_DELTA | native.WRONG_RESULT as status:
            raise DeltaError(f"{op}: {native.reason(status)}")
        case status:
            raise NativeError(f"{op}: {native.reason(status)}")


def _encode(
    chosen: Backend,
    plan: str,
    first: Tensor,
    second: Tensor,
    versions: tuple[int, int],
    threads: int | None = None,
) -> Delta:
    """Plan, allocate and write; `second` holds the new values once planned."""
    count = second.numel()
    workspace = _workspace(second)
    room = (workspace.data_ptr(), workspace.numel())
    addresses = (first.data_ptr(), second.data_ptr(), count)
    if chosen is Backend.NATIVE:
        threads, size = threads or torch.get_num_threads(), ctypes.c_int64()
        native.call(f"slipstream_{plan}", *addresses, *versions, threads, *room, ctypes.byref(size))
        data = torch.empty(size.value, dtype=torch.uint8)
        write = (second.data_ptr(), count, threads, workspace.data_ptr(), data.data_ptr(), data.numel())
        native.call("slipstream_delta_write", *write)
        return Delta.of(data)
    with torch.cuda.device(second.device):
        stream = torch.cuda.current_stream().cuda_stream
        planned = torch.empty(1, dtype=torch.int64, device=second.device)
        native_cuda.call(f"slipstream_cuda_{plan}", *addresses, *versions, *room, planned.data_ptr(), stream)
        data = torch.empty(int(planned), dtype=torch.uint8, device=second.device)
        queued = (second.data_ptr(), count, workspace.data_ptr(), data.data_ptr(), data.numel(), stream)
        native_cuda.call("slipstream_cuda_delta_write", *queued)
    return Delta.of(data)


def _apply(chosen: Backend, base: Tensor, data: Tensor, output: Tensor, threads: int | None) -> int:
    """Return the status of applying the bytes `data`."""
    arguments = (base.data_ptr(), base.numel(), data.data_ptr(), data.numel())
    if chosen is Backend.NATIVE:
        threads = threads or torch.get_num_threads()
        return native.status_of("slipstream_delta_apply", *arguments, threads, output.data_ptr())
    with torch.cuda.device(base.device):
        workspace = _workspace(base)
        status = torch.empty(1, dtype=torch.int32, device=base.device)
        native_cuda.call(
            "slipstream_cuda_delta_apply",
            *arguments,
            *(workspace.data_ptr(), workspace.numel(), output.data_ptr(), status.data_ptr()),
            torch.cuda.current_stream().cuda_stream,
        )
        return int(status)


def _workspace(weights: Tensor) -> Tensor:
    blocks = -(-weights.numel() // reference.BLOCK)
    return torch.empty(128 + 72 * blocks, dtype=torch.uint8, device=weights.device)


def _aligned(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor at an address that vectors of 16 bytes can be read from."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _words(tensor: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    return tensor.detach().cpu().reshape(-1).view(torch.int16).numpy().view(np.uint16)


def _check_weights(op: str, name: str, weights: Tensor) -> None:
    if weights.element_size() != 2:
        raise ShapeError(f"{op}: {name} must be of a type of 2 bytes, such as bfloat16, got {weights.dtype}")


def _check_versions(op: str, *versions: int) -> None:
    if not all(0 <= version < 1 << 64 for version in versions):
        raise ShapeError(f"{op}: base_version and new_version must be in [0, 2^64), got {versions}")
