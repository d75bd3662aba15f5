"""Floor 4. Weight matrices in 8 bits: e4m3 values with one float32 scale for each tile.

Dimensions: V rows (vocabulary or outputs), H columns (hidden), D tiles down, A tiles across.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from slipstream_kernels import native, native_cuda
from slipstream_kernels.checksum import checksum64
from slipstream_kernels.dispatch import Backend, choose
from slipstream_kernels.errors import BackendError, NativeError, ShapeError
from slipstream_kernels.reference import fp8 as reference

IMPLEMENTED = (Backend.CUDA, Backend.NATIVE, Backend.REFERENCE)
CUDA_BLOCK = (128, 128)
"""Tiles of the CUDA kernel: each lies in the registers of one thread block."""


class Fp8Weight(NamedTuple):
    """A quantized matrix: weight = values * scale of the tile, nearly."""

    values: Tensor
    """[V, H] float8_e4m3fn."""
    scales: Tensor
    """[D, A] float32."""
    checksum: int
    """checksum64 of the two little-endian words checksum64(values), checksum64(scales)."""


@torch.no_grad()
def fp8_quantize(
    weight_VH: Tensor, *, block: tuple[int, int] = (128, 128), backend: Backend | str | None = None
) -> Fp8Weight:
    """Return a matrix in e4m3, with one scale for each tile of `block` rows and columns.

        scale = max(amax / 448, 2^-126), or 1 for a tile of zeros;   value = e4m3(weight / scale)

    by float32 division, rounded to nearest even, saturating at +-448; tiles at the right and lower
    edge are as large as what is left. weight_VH: [V, H] float32 or bfloat16, finite. With
    D = ceil(V / block[0]) and A = ceil(H / block[1]), scales are [D, A]. Every backend gives the same
    bits; "cuda" takes tiles of 128 x 128. Raises ShapeError and BackendError. Source of the tiles:
    DeepSeek-V3, arXiv:2412.19437, section 3.3.2.
    """
    op = "fp8_quantize"
    if weight_VH.ndim != 2 or weight_VH.dtype not in (torch.float32, torch.bfloat16):
        got = f"{list(weight_VH.shape)} {weight_VH.dtype}"
        raise ShapeError(f"{op}: weight_VH must be [V, H] float32 or bfloat16, got {got}")
    if min(block) < 1:
        raise ShapeError(f"{op}: block must be two positive numbers, got {block}")
    device = weight_VH.device.type
    # None takes the CUDA kernel only for its own tiles; an explicit choice is refused below.
    fitting = tuple(b for b in IMPLEMENTED if b is not Backend.CUDA or block == CUDA_BLOCK)
    chosen = choose(op, backend, implemented=fitting if backend is None else IMPLEMENTED, device=device)
    if chosen is Backend.CUDA and block != CUDA_BLOCK:
        raise BackendError(f"{op}: backend 'cuda' takes block {CUDA_BLOCK}, got {block}")
    weight = weight_VH.contiguous()
    if chosen is Backend.REFERENCE:
        _check_finite(op, bool(weight.isfinite().all()))
        values, scales = reference.fp8_quantize(weight, block)
    else:
        values, scales = _outputs(weight, block)
        run = _run_native if chosen is Backend.NATIVE else _run_cuda
        run(op, weight, block, values, scales)
    parts = [checksum64(values.view(torch.uint8)), checksum64(scales)]
    return Fp8Weight(values, scales, checksum64(np.array(parts, dtype="<u8")))


def fp8_dequantize(weight: Fp8Weight, *, block: tuple[int, int] = (128, 128)) -> Tensor:
    """Return [V, H] float32: each value times the scale of its tile."""
    rows, columns = weight.values.shape
    scale = weight.scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.values.float() * scale


def _outputs(weight_VH: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    tiles = [math.ceil(size / tile) for size, tile in zip(weight_VH.shape, block, strict=True)]
    values = torch.empty(weight_VH.shape, dtype=torch.float8_e4m3fn, device=weight_VH.device)
    return values, torch.empty(tiles, dtype=torch.float32, device=weight_VH.device)


def _run_native(op: str, weight_VH: Tensor, block: tuple[int, int], values: Tensor, scales: Tensor) -> None:
    status = native.status_of(
        "slipstream_fp8_quantize",
        *(weight_VH.data_ptr(), weight_VH.dtype is torch.bfloat16, *weight_VH.shape, *block),
        *(torch.get_num_threads(), values.data_ptr(), scales.data_ptr()),
    )
    _check_finite(op, status != native.NOT_FINITE)
    if status != native.OK:
        raise NativeError(f"slipstream_fp8_quantize: {native.reason(status)}")


def _run_cuda(op: str, weight_VH: Tensor, block: tuple[int, int], values: Tensor, scales: Tensor) -> None:
    with torch.cuda.device(weight_VH.device):
        status = torch.empty(1, dtype=torch.int32, device=weight_VH.device)
        native_cuda.call(
            "slipstream_cuda_fp8_quantize",
            *(weight_VH.data_ptr(), weight_VH.dtype is torch.bfloat16, *weight_VH.shape),
            *(values.data_ptr(), scales.data_ptr(), status.data_ptr()),
            torch.cuda.current_stream().cuda_stream,
        )
        _check_finite(op, int(status) != native.NOT_FINITE)


def _check_finite(op: str, finite: bool) -> None:
    if not finite:
        raise ShapeError(f"{op}: weight_VH must be finite, got infinity or NaN")
