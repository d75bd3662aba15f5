"""Scans and group baselines against golden values and a recurrence in Python floats."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slipstream_kernels import (
    BackendError,
    Baseline,
    ShapeError,
    discounted_return,
    gae,
    group_advantage,
    native,
    segment_scan,
    vtrace,
)
from slipstream_kernels.testing import assert_matches_reference, cu_seqlens_of

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason=native.description())),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 1, 0], [7], [8, 1, 0, 13], [64] * 9, [1000, 3]])
def test_scan_equals_its_recurrence(backend: str, lengths: list[int]) -> None:
    bounds = cu_seqlens_of(lengths)
    decay, value = torch.rand(sum(lengths)), torch.randn(sum(lengths))
    expected = torch.zeros(sum(lengths), dtype=torch.float64)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        carry = 0.0
        for t in reversed(range(start, end)):
            carry = float(value[t]) + float(decay[t]) * carry
            expected[t] = carry
    assert torch.equal(segment_scan(decay, value, bounds, backend=backend), expected.float())


@pytest.mark.skipif(not native.available(), reason=native.description())
@pytest.mark.parametrize("threads", [1, 2])
def test_native_bits_equal_the_reference(threads: int) -> None:
    lengths = torch.randint(0, 900, (120,)).tolist()
    decay, value = torch.rand(sum(lengths)) * 1.1, torch.randn(sum(lengths)) * 100
    torch.set_num_threads(threads)
    bounds = cu_seqlens_of(lengths)
    results = [segment_scan(decay, value, bounds, backend=name) for name in ("reference", "native")]
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gae_golden_skips_the_observation_hole(backend: str) -> None:
    nan = float("nan")
    advantage, target = gae(
        torch.tensor([0.2, 0.3, nan, nan, 0.4, 0.5, 0.6]),
        torch.tensor([0, 0, nan, 0, -0.05, 0, 1.0]),
        torch.tensor([1, 1, 0, 0, 1, 1, 1]),
        torch.tensor([0, 7]),
        discount=0.99,
        gae_lambda=0.95,
        backend=backend,
    )
    expected = torch.tensor([0.618256, 0.554233, 0, 0, 0.487223, 0.470200, 0.4])
    assert advantage.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert target[-1].item() == pytest.approx(1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vtrace_golden(backend: str) -> None:
    advantage, target = vtrace(
        torch.tensor([0.5, 0.4, 0.3, 0.2]),
        torch.tensor([0, 0, 0, 1.0]),
        torch.ones(4),
        torch.tensor([0, 4]),
        log_ratio_N=torch.tensor([1.5, 0.5, 2.0, 0.8]).log(),
        discount=0.9,
        backend=backend,
    )
    assert target.tolist() == pytest.approx([0.486180, 0.540200, 0.756000, 0.840000], abs=1e-6)
    assert advantage.tolist() == pytest.approx([-0.013820, 0.140200, 0.456000, 0.640000], abs=1e-6)


def test_on_policy_vtrace_is_gae() -> None:
    values, rewards, mask = torch.randn(40), torch.randn(40), torch.randint(0, 2, (40,))
    bounds, bootstrap = torch.tensor([0, 11, 11, 40]), torch.randn(3)
    factors: dict[str, Any] = {"discount": 0.9, "gae_lambda": 0.8, "bootstrap_S": bootstrap}
    _, target = vtrace(values, rewards, mask, bounds, log_ratio_N=torch.zeros(40), **factors)
    assert_matches_reference(target, gae(values, rewards, mask, bounds, **factors)[1])


def test_return_bootstraps_each_truncated_segment() -> None:
    rewards = torch.tensor([1.0, 7.0, 2.0, 4.0])
    result = discounted_return(
        rewards,
        torch.tensor([1, 0, 1, 1]),
        torch.tensor([0, 3, 3, 4]),
        discount=0.5,
        bootstrap_S=torch.tensor([8.0, 100.0, 0.0]),
    )
    assert result.tolist() == [1 + 0.5 * 6, 0.0, 2 + 0.5 * 8, 4.0]


def test_everything_masked_is_zero() -> None:
    advantage, target = gae(torch.ones(3), torch.ones(3), torch.zeros(3), torch.tensor([0, 2, 3]))
    assert advantage.tolist() == target.tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Baseline.MEAN, [0.5, -0.5, -0.5, 0.5]),
        (Baseline.STD, [0.866025, -0.866025, -0.866025, 0.866025]),
        (Baseline.RLOO, [0.666667, -0.666667, -0.666667, 0.666667]),
        (Baseline.OPO, [0.25, -0.75, -0.75, 0.25]),
    ],
)
def test_group_baselines_golden(kind: Baseline, expected: list[float]) -> None:
    # The groups lie interleaved; one has equal rewards, one a single member.
    order = torch.tensor([4, 0, 5, 1, 8, 6, 2, 7, 3])
    rewards = torch.tensor([1, 0, 0, 1, 1, 1, 1, 1, 0.5])[order]
    groups = torch.tensor([9, 9, 9, 9, 4, 4, 4, 4, 7])[order]
    lengths = torch.tensor([4, 2, 2, 8, 1, 2, 3, 4, 5])[order] if kind is Baseline.OPO else None
    actual = torch.empty(9)
    actual[order] = group_advantage(rewards, groups, kind=kind, lengths_G=lengths)
    assert actual.tolist() == pytest.approx([*expected, 0, 0, 0, 0, 0], abs=1e-6)


def test_std_floor_bounds_the_amplification() -> None:
    rewards, groups = torch.tensor([-1.0, -1.02]), torch.tensor([0, 0])
    assert group_advantage(rewards, groups, kind="std").abs().max().item() == pytest.approx(
        0.707107, abs=1e-5
    )
    floored = group_advantage(rewards, groups, kind="std", std_floor=0.5)
    assert floored.tolist() == pytest.approx([0.02, -0.02], abs=1e-6)


def test_equal_rewards_give_exactly_zero() -> None:
    # The mean of three times 0.1 is not 0.1 in floating point.
    for kind in ("mean", "std", "rloo"):
        assert group_advantage(torch.full((3,), 0.1), torch.zeros(3).long(), kind=kind).tolist() == [0.0] * 3


def test_refuses_bad_arguments() -> None:
    one = torch.tensor([0])
    with pytest.raises(ShapeError, match="rewards_G must be finite, got 1"):
        group_advantage(torch.tensor([float("nan")]), one)
    with pytest.raises(ShapeError, match="kind must be one of mean, std, rloo, opo, got 'median'"):
        group_advantage(torch.tensor([1.0]), one, kind="median")
    with pytest.raises(ShapeError, match="lengths_G must be given when kind is opo"):
        group_advantage(torch.tensor([1.0]), one, kind="opo")
    with pytest.raises(ShapeError, match=r"discount must be in \[0.0, 1.0\], got 1.5"):
        discounted_return(torch.ones(1), torch.ones(1), torch.tensor([0, 1]), discount=1.5)
    with pytest.raises(ShapeError, match=r"bootstrap_S must have shape \[1\]"):
        discounted_return(torch.ones(1), torch.ones(1), torch.tensor([0, 1]), bootstrap_S=torch.ones(2))
    with pytest.raises(
        BackendError, match="backend 'triton' does not exist for this op; choose one of native"
    ):
        segment_scan(torch.ones(1), torch.ones(1), torch.tensor([0, 1]), backend="triton")
