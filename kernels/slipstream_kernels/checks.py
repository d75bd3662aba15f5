"""Floor 1. Checks of arguments: each failure names op, argument, expected and got.

Dimensions: N packed tokens, S segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream_kernels.errors import ShapeError


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ShapeError unless `tensor` has exactly `shape`."""
    if tensor.shape != shape:
        raise ShapeError(f"{op}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")


def check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ShapeError unless `tensor` lies on `device`: kernels take its address as one there."""
    if tensor.device != device:
        raise ShapeError(f"{op}: {name} must be on {device} like the other tensors, got {tensor.device}")


def plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in this type, contiguous: itself where it already is, sooner than PyTorch says so."""
    if tensor.dtype is dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()


def check_range(op: str, name: str, value: float, low: float, high: float) -> None:
    """Raise ShapeError unless low <= value <= high."""
    if not low <= value <= high:
        raise ShapeError(f"{op}: {name} must be in [{low}, {high}], got {value}")


def check_integers(op: str, labels_N: Tensor) -> None:
    """Raise ShapeError unless labels are integers."""
    if labels_N.is_floating_point() or labels_N.dtype is torch.bool:
        raise ShapeError(f"{op}: labels_N must hold integers, got {labels_N.dtype}")


def check_labels(op: str, labels_N: Tensor, vocabulary: int) -> None:
    """Raise ShapeError unless labels are integers in [0, vocabulary); values are checked on the CPU only."""
    check_integers(op, labels_N)
    # Reading values of a GPU tensor would wait for the device; there the gather asserts.
    if _readable(labels_N) and labels_N.numel():
        low, high = (int(bound) for bound in torch.aminmax(labels_N))
        if low < 0 or high >= vocabulary:
            raise ShapeError(f"{op}: labels_N must be in [0, {vocabulary}), got values from {low} to {high}")


def check_cu_seqlens(op: str, cu_seqlens: Tensor, tokens: int, *, values: bool = True) -> Tensor:
    """Return [S + 1] int64 segment bounds, which begin with 0, never fall and end with `tokens`.

    Raises ShapeError; values are checked on the CPU only, and not where `values` says that the native
    library will, which is sooner done.
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0 or cu_seqlens.is_floating_point():
        got = f"{list(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise ShapeError(f"{op}: cu_seqlens must be a vector of at least one integer, got {got}")
    bounds = cu_seqlens if cu_seqlens.dtype is torch.int64 else cu_seqlens.to(torch.int64)
    if values and _readable(bounds):
        ends_right = int(bounds[0]) == 0 and int(bounds[-1]) == tokens
        if not ends_right or bool((bounds.diff() < 0).any()):
            raise ShapeError(
                f"{op}: cu_seqlens must begin with 0, never fall and end with {tokens}, got {_shown(bounds)}"
            )
    return bounds


def _readable(tensor: Tensor) -> bool:
    """Return whether values can be looked at: on the CPU, and not while an op is being compiled."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _shown(bounds: Tensor) -> str:
    values = [str(int(bound)) for bound in bounds]
    return ", ".join(values if len(values) <= 8 else [*values[:4], "...", *values[-3:]])
