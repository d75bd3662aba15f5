"""Floor 3. Tolerances and comparisons that every test of an op shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far a result may be from its reference: |actual - expected| <= absolute + relative |expected|."""

    relative: float
    absolute: float


TOLERANCES = {
    torch.float64: Tolerance(relative=1e-10, absolute=1e-12),
    torch.float32: Tolerance(relative=1e-5, absolute=1e-6),
    torch.bfloat16: Tolerance(relative=2e-2, absolute=1e-2),
    torch.float16: Tolerance(relative=2e-3, absolute=1e-3),
}
"""By the type of the op's input: rounding of the input dominates."""


def assert_matches_reference(actual: Tensor, expected: Tensor, *, dtype: torch.dtype = torch.float32) -> None:
    """Raise AssertionError unless shapes are equal and values within the tolerance of `dtype`.

    Values are compared in float64; NaN never matches.
    """
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        actual.detach().double(), expected.detach().double(), rtol=tolerance.relative, atol=tolerance.absolute
    )


def cu_seqlens_of(lengths: list[int]) -> Tensor:
    """Return [S + 1] int64 bounds of segments with these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0)
