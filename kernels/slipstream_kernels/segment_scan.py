"""Floor 4. The affine reverse scan over packed segments that every estimator of advantages is a case of.

Dimensions: N packed tokens, S segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream_kernels import native, native_cuda, reference
from slipstream_kernels.checks import check_cu_seqlens, check_shape, plain
from slipstream_kernels.dispatch import Backend, choose

IMPLEMENTED = (Backend.CUDA, Backend.TRITON, Backend.NATIVE, Backend.REFERENCE)
CUDA_TILE = 4096
"""Tokens of a tile of the CUDA kernel."""


@torch.no_grad()
def segment_scan(
    decay_N: Tensor, input_N: Tensor, cu_seqlens: Tensor, *, backend: Backend | str | None = None
) -> Tensor:
    """Return the affine reverse scan of each segment.

        output_t = input_t + decay_t * output_{t+1},   output_{t+1} = 0 after the end of a segment

    decay_N, input_N: [N]; cu_seqlens: [S + 1] segment bounds. Returns [N] float32. "reference" and
    "native" compute in float64 and give the same bits; "triton" and "cuda" compute in float32, as a
    balanced tree over fixed tiles of the packed axis, for decays in [0, 1]: within 1e-5 of them, and
    with the same bits in every run. Values that are not finite stay within their segment. Raises
    ShapeError and BackendError.
    """
    op, tokens = "segment_scan", input_N.numel()
    check_shape(op, "input_N", input_N, (tokens,))
    check_shape(op, "decay_N", decay_N, (tokens,))
    bounds = plain(check_cu_seqlens(op, cu_seqlens, tokens), torch.int64)
    decay, value = plain(decay_N, torch.float32), plain(input_N, torch.float32)
    match choose(op, backend, implemented=IMPLEMENTED, device=input_N.device.type):
        case Backend.NATIVE:
            return _scan_native(decay, value, bounds)
        case Backend.TRITON:
            # Imported here: only a chosen backend loads Triton.
            from slipstream_kernels.triton.segment_scan import segment_scan as scan_triton

            return scan_triton(decay, value, bounds)
        case Backend.CUDA:
            return _scan_cuda(decay, value, bounds)
        case _:
            return reference.segment_scan(decay, value, bounds)


def _scan_native(decay_N: Tensor, input_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    output_N = torch.empty_like(input_N)
    native.segment_scan(
        decay_N.data_ptr(),
        input_N.data_ptr(),
        cu_seqlens.data_ptr(),
        segments=cu_seqlens.numel() - 1,
        tokens=input_N.numel(),
        threads=torch.get_num_threads(),
        output=output_N.data_ptr(),
    )
    return output_N


def _scan_cuda(decay_N: Tensor, input_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    tokens, output_N = input_N.numel(), torch.empty_like(input_N)
    with torch.cuda.device(input_N.device):
        workspace = torch.empty(2 * -(-tokens // CUDA_TILE), dtype=torch.float32, device=input_N.device)
        native_cuda.call(
            "slipstream_cuda_segment_scan_f32",
            *(decay_N.data_ptr(), input_N.data_ptr(), cu_seqlens.data_ptr(), cu_seqlens.numel() - 1, tokens),
            *(workspace.data_ptr(), 4 * workspace.numel(), output_N.data_ptr()),
            torch.cuda.current_stream().cuda_stream,
        )
    return output_N
