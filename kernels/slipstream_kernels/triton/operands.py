"""Floor 3. How tensors are handed to the kernels of the linear head: descriptors or pointers, types, tiles.

Dimensions: C rows, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from slipstream_kernels.dispatch import interpreted
from slipstream_kernels.tuning import TILES, Tile, Work, head_tile

ALIGNMENT_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """Both factors of hidden @ weight.T as a kernel takes them."""

    hidden: Any
    """[C, H]: a tensor descriptor where the tile asks for it, else a tensor."""
    weight: Any
    """[V, H], likewise."""
    output: Any
    """[C, V], likewise, or None."""
    width: int
    """H."""
    tile: Tile


def operands(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    output_CV: Tensor | None = None,
    *,
    tile: Tile | None = None,
    plain: bool = True,
    work: Work = Work.HEAD,
) -> Operands:
    """Return both factors in one type and layout, and the output, with a tile that serves them.

    hidden_CH: [C, H]; weight_VH: [V, H]; output_CV: [C, V] or None; plain: the product has neither bias nor
    softcap. `tile`, where given, is taken as it is.
    """
    dtype = torch.promote_types(hidden_CH.dtype, weight_VH.dtype)
    # The interpreter's products of bfloat16 are wrong without a word.
    dtype = torch.float32 if interpreted() else dtype
    hidden, weight = hidden_CH.to(dtype).contiguous(), weight_VH.to(dtype).contiguous()
    name = head_tile(
        element_bytes=dtype.itemsize,
        logit_bytes=0 if output_CV is None else output_CV.element_size(),
        plain=plain,
        work=work,
        architecture=None if interpreted() else torch.cuda.get_device_capability(hidden.device),
        aligned=all(_aligned(matrix) for matrix in (hidden, weight, output_CV) if matrix is not None),
    )
    chosen = tile or TILES[name]
    if not chosen.descriptors:
        return Operands(hidden=hidden, weight=weight, output=output_CV, width=hidden.shape[1], tile=chosen)
    output = output_CV
    if output_CV is not None:
        output = TensorDescriptor.from_tensor(output_CV, [chosen.rows, chosen.columns_at_once])
    return Operands(
        hidden=TensorDescriptor.from_tensor(hidden, [chosen.rows, chosen.hidden]),
        weight=TensorDescriptor.from_tensor(weight, [chosen.columns, chosen.hidden]),
        output=output,
        width=hidden.shape[1],
        tile=chosen,
    )


def paired_operands(
    p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor], *, work: Work, tile: Tile | None = None
) -> tuple[Operands, Operands]:
    """Return the operands of two heads that one kernel multiplies, with one tile; each [C, H] and [V, H]."""
    left, right = operands(*p, tile=tile, work=work), operands(*q, tile=tile, work=work)
    if left.tile == right.tile:
        return left, right
    # One head is of float32 or not aligned: the tile that serves it serves the other too.
    wide = TILES["float32"]
    common = wide if wide in (left.tile, right.tile) else TILES["two_heads_pointers"]
    return operands(*p, tile=common), operands(*q, tile=common)


@contextmanager
def writable(output: Tensor | None) -> Iterator[Tensor | None]:
    """Yield what a kernel writes for `output`: itself; in the interpreter a float32 copy, rounded at the end.

    The interpreter truncates to bfloat16 instead of rounding to nearest.
    """
    if output is None or not interpreted() or output.dtype is torch.float32:
        yield output
        return
    wide = output.float()
    yield wide
    output.copy_(wide)


def _aligned(matrix: Tensor) -> bool:
    row_bytes = matrix.shape[1] * matrix.element_size()
    return matrix.data_ptr() % ALIGNMENT_BYTES == 0 and row_bytes % ALIGNMENT_BYTES == 0
