"""The numbers guard: quiet on the curves of real runs, loud on everything that is planted into them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from slipstream.guard import HARMLESS, LARGEST, WARMUP, SpikeGuard

# The most violent of 23 recorded runs on small batches.
CURVES = json.loads((Path(__file__).parent / "data/healthy_curves.json").read_text())


@pytest.mark.parametrize("run", CURVES)
def test_no_step_of_a_healthy_run_is_refused(run: str) -> None:
    guard = SpikeGuard(20.0)
    for loss, norm in zip(CURVES[run]["loss"], CURVES[run]["gradient norm"], strict=True):
        assert guard.fault(loss, norm) == ""
        guard.accept(loss, norm)


@pytest.mark.parametrize("run", CURVES)
@pytest.mark.parametrize("size", [100.0, 1e4, 1e30, math.inf, math.nan])
def test_a_spike_planted_anywhere_behind_the_warm_up_is_refused(run: str, size: float) -> None:
    guard = SpikeGuard(20.0)
    for place, (loss, norm) in enumerate(zip(*CURVES[run].values(), strict=True)):
        if place >= WARMUP or not size <= LARGEST:
            for sign in (size, -size):
                assert guard.fault(sign, norm).startswith("loss is ")
            assert guard.fault(loss, size).startswith("gradient norm is ")
        guard.accept(loss, norm)


def test_the_limit_is_a_multiple_of_the_usual_and_never_below_the_harmless() -> None:
    guard = SpikeGuard(4.0)
    for value in range(1, 21):
        guard.accept(float(value), 0.001)
    assert guard.fault(4 * 18.0, 0.0) == ""
    assert guard.fault(-4 * 19.0, 0.0) == "loss is -76, a spike: expected at most 72.4"
    assert guard.fault(0.0, HARMLESS) == ""
    assert guard.fault(0.0, 1.01 * HARMLESS) == "gradient norm is 1.01, a spike: expected at most 1"
