"""An objective that cannot be computed does not exist."""

from __future__ import annotations

import math
from typing import Any

import pytest

from slipstream_kernels import Aggregation, Objective, ObjectiveError


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ({"clip_low": 0.0}, "clip_low"),
        ({"clip_low": 1.1}, "clip_low"),
        ({"clip_high": math.inf}, "clip_high"),
        ({"importance_cap": 0.5}, "importance_cap"),
        ({"trust_low": 1.5}, "trust_low"),
        ({"trust_high": 0.9}, "trust_high"),
        ({"kl_coefficient": -0.1}, "kl_coefficient"),
        ({"entropy_coefficient": math.nan}, "entropy_coefficient"),
        ({"aggregation": "median"}, "aggregation"),
        ({"aggregation": "fixed"}, "fixed_length"),
        ({"fixed_length": 5}, "fixed_length"),
    ],
)
def test_refuses_each_member_out_of_range(members: dict[str, Any], named: str) -> None:
    with pytest.raises(ObjectiveError, match=f"Objective.{named} must be"):
        Objective(**members)


def test_aggregation_may_be_a_string() -> None:
    objective = Objective(aggregation="fixed", fixed_length=5)  # type: ignore[arg-type]
    assert objective.aggregation is Aggregation.FIXED
