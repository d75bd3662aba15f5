"""Floor 3. The affine reverse scan over packed segments in Triton: two passes over tiles of tokens.

A token is the map x -> a x + b, and a stretch of tokens the composition of its own. The last token of a
segment has a = 0, so nothing passes from one segment into another. Tiles are loaded backwards, so that the
scan over them runs forwards.

Dimensions: N packed tokens, T tiles.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
TILES_AT_ONCE = 256
WARPS = 4


def segment_scan(decay_N: Tensor, input_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return [N] float32: the scan of the public op, of checked contiguous float32 tensors."""
    tokens = input_N.numel()
    output_N = torch.empty_like(input_N)
    if tokens == 0:
        return output_N
    tiles = triton.cdiv(tokens, TILE)
    begins = torch.zeros(tokens + 1, dtype=torch.int8, device=input_N.device).index_fill(0, cu_seqlens, 1)
    decay_T, sum_T, carry_T = input_N.new_empty(3, tiles)
    reduce_tiles[(tiles,)](decay_N, input_N, begins, tokens, decay_T, sum_T, TILE=TILE, num_warps=WARPS)
    carry_tiles[(1,)](decay_T, sum_T, tiles, carry_T, TILES=TILES_AT_ONCE, num_warps=WARPS)
    scan_tiles[(tiles,)](decay_N, input_N, begins, tokens, carry_T, output_N, TILE=TILE, num_warps=WARPS)
    return output_N


@triton.jit
def compose(a_earlier, b_earlier, a_later, b_later):
    """Return the later map after the earlier one; selected where its decay is 0, because 0 * inf is NaN."""
    return a_later * a_earlier, b_later + a_later * tl.where(a_later == 0.0, 0.0, b_earlier)


@triton.jit
def scanned_tile(decay, value, begins, tokens, TILE: tl.constexpr):
    """Return the tokens of this program's tile, last first, and the compositions up to each."""
    token = tl.program_id(0).to(tl.int64) * TILE + (TILE - 1 - tl.arange(0, TILE))
    inside = token < tokens
    # Tokens past the end stand before all others, and are the identity.
    a = tl.load(decay + token, mask=inside, other=1.0)
    b = tl.load(value + token, mask=inside, other=0.0)
    last = tl.load(begins + token + 1, mask=inside, other=0) != 0
    a, b = tl.associative_scan((tl.where(last, 0.0, a), b), 0, compose)
    return token, inside, a, b


@triton.jit
def reduce_tiles(decay, value, begins, tokens, tile_decay, tile_sum, TILE: tl.constexpr):
    """Write the composition of each tile."""
    token, _, a, b = scanned_tile(decay, value, begins, tokens, TILE)
    tile = tl.program_id(0)
    first = token == tile.to(tl.int64) * TILE
    tl.store(tile_decay + tile, tl.sum(tl.where(first, a, 0.0), axis=0))
    tl.store(tile_sum + tile, tl.sum(tl.where(first, b, 0.0), axis=0))


@triton.jit
def carry_tiles(tile_decay, tile_sum, tiles, carry, TILES: tl.constexpr):
    """Write what follows each tile; one program."""
    row = tl.arange(0, TILES)
    # What all tiles behind the current ones give.
    behind = tl.sum(tl.zeros((TILES,), dtype=tl.float32), axis=0)
    for done in range(0, tiles, TILES):
        tile = tiles - 1 - done - row
        inside = tile >= 0
        a = tl.load(tile_decay + tile, mask=inside, other=1.0)
        b = tl.load(tile_sum + tile, mask=inside, other=0.0)
        a, b = tl.associative_scan((a, b), 0, compose)
        result = b + a * tl.where(a == 0.0, 0.0, behind)
        tl.store(carry + tile - 1, result, mask=tile >= 1)
        if done == 0:
            tl.store(carry + tile, 0.0, mask=row == 0)
        behind = tl.sum(tl.where(row == TILES - 1, result, 0.0), axis=0)


@triton.jit
def scan_tiles(decay, value, begins, tokens, carry, output, TILE: tl.constexpr):
    """Scan each tile with what follows it."""
    token, inside, a, b = scanned_tile(decay, value, begins, tokens, TILE)
    behind = tl.load(carry + tl.program_id(0))
    tl.store(output + token, b + a * tl.where(a == 0.0, 0.0, behind), mask=inside)
