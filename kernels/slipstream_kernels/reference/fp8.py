"""Floor 1. Matrices as e4m3 with a scale for each tile, in plain PyTorch.

Dimensions: V rows, H columns, D tiles down, A tiles across, R rows of a tile, C columns of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0
"""The largest finite e4m3 value."""
LEAST_SCALE = 2.0**-126
"""The smallest normal float32: below it the scale would lose its digits."""


def fp8_quantize(weight_VH: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return [V, H] float8_e4m3fn values and [D, A] float32 scales; see the public op for the formula."""
    (rows, columns), (tile_rows, tile_columns) = weight_VH.shape, block
    down, across = -(-rows // tile_rows), -(-columns // tile_columns)
    padding = (0, across * tile_columns - columns, 0, down * tile_rows - rows)
    tiles_DRAC = torch.nn.functional.pad(weight_VH.float(), padding).view(
        down, tile_rows, across, tile_columns
    )
    amax_DA = tiles_DRAC.abs().amax(dim=(1, 3))
    scale_DA = torch.where(amax_DA == 0, 1.0, (amax_DA / LARGEST).clamp(min=LEAST_SCALE))
    scaled_DRAC = (tiles_DRAC / scale_DA[:, None, :, None]).clamp(-LARGEST, LARGEST)
    values = scaled_DRAC.to(torch.float8_e4m3fn).view(down * tile_rows, across * tile_columns)
    return values[:rows, :columns].contiguous(), scale_DA
