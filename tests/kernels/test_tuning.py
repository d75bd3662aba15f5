"""Which tile is chosen: by type, device and what is applied to the product."""

from __future__ import annotations

from typing import Any

import pytest

from slipstream_kernels.tuning import Work, head_tile

HOPPER: dict[str, Any] = {
    "element_bytes": 2,
    "architecture": (9, 0),
    "aligned": True,
}


@pytest.mark.parametrize(
    ("changes", "tile"),
    [
        ({}, "wide"),
        ({"logit_bytes": 2}, "wide"),
        ({"logit_bytes": 4}, "writing_float32"),
        ({"plain": False}, "square"),
        ({"plain": False, "logit_bytes": 2}, "square"),
        ({"plain": False, "logit_bytes": 4}, "writing_float32"),
        ({"aligned": False}, "pointers"),
        ({"architecture": (8, 0)}, "pointers"),
        ({"architecture": (8, 0), "logit_bytes": 2}, "pointers_writing"),
        ({"element_bytes": 4}, "float32"),
        ({"work": Work.TWO_HEADS}, "two_heads"),
        ({"work": Work.MIXTURE}, "mixture"),
        ({"work": Work.MIXTURE, "aligned": False}, "two_heads_pointers"),
        ({"architecture": None}, "interpreted"),
    ],
)
def test_choice(changes: dict[str, Any], tile: str) -> None:
    assert head_tile(**(HOPPER | changes)) == tile
