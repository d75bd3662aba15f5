"""Floor 2. Which tile a Triton kernel uses: plain tables with reasons, one row a configuration.

A configuration is chosen by the type of the numbers, the hidden size and the Triton version only: never by
the number of rows nor by the size of the vocabulary, since another tile adds in another order, and results
must not depend on how rows and vocabulary are cut. (One exception: logits that are written in rows not
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
    warp_specialize: bool = False
    """Loads, products and statistics run in warps of their own."""


class Work(StrEnum):
    """What a kernel does with the products."""

    HEAD = "head"
    """Statistics of one head; its logits are written where asked."""
    TWO_HEADS = "two_heads"
    """Statistics of two heads, which stand side by side."""
    MIXTURE = "mixture"
    """Two heads, and in a second pass the logarithm of their mixture."""


TILES = {
    # 96 KiB and at most 255 registers of 128 threads: two programs share a multiprocessor, and the statistics
    # of one hide under the products of the other.
    "pair": Tile(rows=128, columns=128, hidden=64, warps=4, stages=3, descriptors=True),
    # Twice the products for each byte loaded. Takes effect at 4 warps only: at 8 Triton ignores it silently.
    "specialised": Tile(
        rows=128, columns=256, hidden=64, warps=4, stages=3, descriptors=True, warp_specialize=True
    ),
    # Logits that are written pass through shared memory: with 2 stages, 96 KiB in bfloat16, so that two
    # programs still fit where neither bias nor softcap takes registers. 8 warps, since at 4 the block and its
    # rounded copy overflow the registers.
    "writing": Tile(rows=128, columns=128, hidden=64, warps=8, stages=2, descriptors=True),
    # In float32 they leave room for one program only, which then needs the third stage.
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

SPECIALISED_UNDER = frozenset({"3.6"})
"""Minor versions of Triton that were seen to compile the specialised tile without overflow.

3.9 fails: it splits the rows of a specialised product between two groups of warps, but not the box of its
host descriptor. Others are unknown, and a kernel that does not compile is worse than a slower one.
"""
SPECIALISED_FROM_HIDDEN = 2048
"""Below, statistics weigh more against the products, and two programs a multiprocessor hide them better."""


def head_tile(
    *,
    hidden: int,
    element_bytes: int,
    logit_bytes: int = 0,
    work: Work = Work.HEAD,
    triton_version: str,
    architecture: tuple[int, int] | None,
    aligned: bool,
) -> str:
    """Return the name of the tile for products of width `hidden`.

    logit_bytes: size of a logit that is written, 0 where none is; architecture: compute capability, None in
    the interpreter; aligned: rows of all matrices begin at multiples of 16 bytes.
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
    if logit_bytes:
        return "writing" if logit_bytes <= 2 else "writing_float32"
    specialised = minor_version(triton_version) in SPECIALISED_UNDER and hidden >= SPECIALISED_FROM_HIDDEN
    return "specialised" if specialised else "pair"


def minor_version(version: str) -> str:
    """Return '3.9' for '3.9.0+git1234'."""
    return ".".join(version.split(".")[:2])
