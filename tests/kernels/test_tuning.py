"""Which tile is chosen: by type, hidden size, device and Triton's version."""

from __future__ import annotations

from typing import Any

import pytest

from slipstream_kernels.tuning import Work, head_tile, minor_version

HOPPER: dict[str, Any] = {
    "hidden": 4096,
    "element_bytes": 2,
    "triton_version": "3.6.0",
    "architecture": (9, 0),
    "aligned": True,
}


@pytest.mark.parametrize(
    ("changes", "tile"),
    [
        ({}, "specialised"),
        ({"hidden": 1024}, "pair"),
        ({"triton_version": "3.9.0"}, "pair"),
        ({"triton_version": "4.0.0"}, "pair"),
        ({"logit_bytes": 2}, "writing"),
        ({"logit_bytes": 4}, "writing_float32"),
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


def test_minor_version() -> None:
    assert minor_version("3.10.0+git1234") == "3.10"
