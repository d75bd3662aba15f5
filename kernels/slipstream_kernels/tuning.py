"""Floor 2. Which tile a Triton kernel uses: plain tables with reasons, one row a configuration.

A configuration is chosen by the type of the numbers and what the head applies to them: never by the number
of rows nor by the size of the vocabulary, since another tile adds in another order, and results must not
depend on how rows and vocabulary are cut. (One exception: logits that are written in rows not
aligned to 16 bytes.) Nothing is timed at run time: that would write outputs which are also inputs more than
once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How a matrix product with statistics is cut."""

    rows: int
    columns: int
    hidden: int
    warps: int
    stages: int
    descriptors: bool
    """Loads go through host tensor descriptors (TMA), which sm_90 and later have."""
    halves: bool = False
    """Statistics are taken of one half of the columns after the other, which need fewer registers."""
    group: int = 16
    """Blocks of rows whose programs run side by side; see head_kernels.placed."""

    @property
    def columns_at_once(self) -> int:
        """Return the columns of a block of statistics, and of logits that are written."""
        return self.columns // 2 if self.halves else self.columns


class Work(StrEnum):
    """What a kernel does with the products."""

    HEAD = "head"
    """Statistics of one head; its logits are written where asked."""
    TWO_HEADS = "two_heads"
    """Statistics of two heads, which stand side by side."""
    MIXTURE = "mixture"
    """Two heads, and in a second pass the logarithm of their mixture."""


TILES = {
    # The fewest bytes for each product that fit: at 128 columns, by their count, an H100's L2 cache sets the
    # pace and not its tensor cores. With halves registers and shared memory suffice where nothing but a
    # temperature is applied.
    "wide": Tile(rows=128, columns=256, hidden=64, warps=8, stages=3, descriptors=True, halves=True),
    # With bias or softcap, with or without logits that are written; they pass through shared memory. 8 warps:
    # at 4 the block and its rounded copy overflow the registers. Four stages are 1.2 times as fast on an H100
    # as two, or as three at 4 warps (bench/results/kernels-h100/tiles.md).
    "square": Tile(rows=128, columns=128, hidden=64, warps=8, stages=4, descriptors=True),
    # In float32 they need a multiprocessor for themselves, which leaves room for a third stage.
    "writing_float32": Tile(rows=128, columns=128, hidden=64, warps=8, stages=3, descriptors=True),
    # Before sm_90, and where rows do not begin at multiples of 16 bytes, as TMA demands.
    "pointers": Tile(rows=128, columns=128, hidden=32, warps=8, stages=3, descriptors=False),
    # The addresses of what is written take registers too.
    "pointers_writing": Tile(rows=64, columns=32, hidden=32, warps=4, stages=3, descriptors=False),
    # Exact float32 products run without tensor cores and hold both operands in registers; with a second stage
    # the registers overflow when logits are written.
    "float32": Tile(rows=64, columns=64, hidden=32, warps=4, stages=1, descriptors=False),
    # Two heads at once, one accumulator each: 8 warps, or they would not fit into the registers.
    "two_heads": Tile(rows=128, columns=128, hidden=64, warps=8, stages=3, descriptors=True),
    # The mixture holds three logarithms of each column: at 128 columns the registers overflow.
    "mixture": Tile(rows=128, columns=64, hidden=64, warps=8, stages=3, descriptors=True),
    "two_heads_pointers": Tile(rows=64, columns=64, hidden=32, warps=4, stages=3, descriptors=False),
    # Triton's interpreter pays for each operation, and for rows that are padding.
    "interpreted": Tile(rows=16, columns=128, hidden=32, warps=4, stages=1, descriptors=False),
}


def head_tile(
    *,
    element_bytes: int,
    logit_bytes: int = 0,
    plain: bool = True,
    work: Work = Work.HEAD,
    architecture: tuple[int, int] | None,
    aligned: bool,
) -> str:
    """Return the name of the tile for a product.

    logit_bytes: size of a logit that is written, 0 where none is; plain: neither bias nor softcap is applied;
    architecture: compute capability, None in the interpreter; aligned: rows of all matrices begin at
    multiples of 16 bytes.
    """
    if architecture is None:
        return "interpreted"
    if element_bytes == 4:
        return "float32"
    if architecture < (9, 0) or not aligned:
        if work is not Work.HEAD:
            return "two_heads_pointers"
        return "pointers_writing" if logit_bytes else "pointers"
    if work is not Work.HEAD:
        return work.value
    if logit_bytes == 4:
        return "writing_float32"
    return "wide" if plain else "square"
