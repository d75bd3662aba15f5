"""Scans and estimators against golden values and a recurrence in Python floats."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slipstream_kernels import (
    BackendError,
    ShapeError,
    discounted_return,
    gae,
    native,
    segment_scan,
    td_lambda,
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_turn_level_gae_golden(backend: str) -> None:
    nan = float("nan")
    advantage, target = gae(
        torch.tensor([0.2, 0.3, nan, nan, 0.4, 0.5, 0.6]),
        torch.tensor([0, 0, nan, 0, -0.05, 0, 1.0]),
        torch.tensor([1, 1, 0, 0, 1, 1, 1]),
        torch.tensor([0, 7]),
        discount=0.99,
        gae_lambda=0.95,
        turns_N=torch.tensor([0, 0, -1, -1, 1, 1, 1]),
        backend=backend,
    )
    # By hand: 0.95 - 0.4 in the last turn; 0.99 * 0.4 - 0.2 + 0.99 * 0.95 * 0.55 in the first.
    assert advantage.tolist() == pytest.approx([0.713275, 0.713275, 0, 0, 0.55, 0.55, 0.55], abs=1e-6)
    assert target.tolist() == pytest.approx([0.913275, 0.913275, 0, 0, 0.95, 0.95, 0.95], abs=1e-6)


def test_turns_end_with_their_segment_and_bootstrap() -> None:
    # Both segments hold turn 0; the second is truncated, the third has no sampled token.
    advantage, target = gae(
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
        torch.tensor([1.0, 1.0, 1.0, 1.0]),
        torch.tensor([1, 1, 1, 0]),
        torch.tensor([0, 1, 3, 4]),
        discount=0.5,
        gae_lambda=0.5,
        bootstrap_S=torch.tensor([0.0, 8.0, 100.0]),
        turns_N=torch.zeros(4, dtype=torch.int16),
    )
    assert advantage.tolist() == [0.0, 2.0 + 0.5 * 8 - 2, 2.0 + 0.5 * 8 - 2, 0.0]
    assert target.tolist() == [1.0, 6.0, 6.0, 0.0]


@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 5, 0, 9], [64] * 3])
def test_turns_of_one_token_are_tokens(lengths: list[int]) -> None:
    tokens, bounds = sum(lengths), cu_seqlens_of(lengths)
    values, rewards, mask = torch.randn(tokens), torch.randn(tokens), torch.randint(0, 2, (tokens,))
    factors: dict[str, Any] = {"discount": 0.9, "gae_lambda": 0.8, "bootstrap_S": torch.randn(len(lengths))}
    by_turn = gae(values, rewards, mask, bounds, turns_N=torch.arange(tokens), **factors)
    for ours, theirs in zip(by_turn, gae(values, rewards, mask, bounds, **factors), strict=True):
        assert torch.equal(ours, theirs)


def test_turn_level_equals_float64_over_long_segments() -> None:
    lengths, turns = [50, 0, 31], []
    for length in lengths:
        turns += (torch.arange(length) // 7).tolist()
    values, rewards, mask = torch.randn(81), torch.randn(81), torch.ones(81)
    advantage, _ = gae(
        values,
        rewards,
        mask,
        cu_seqlens_of(lengths),
        discount=0.97,
        gae_lambda=0.9,
        turns_N=torch.tensor(turns),
    )
    expected = torch.zeros(81, dtype=torch.float64)
    for start, end in ((0, 50), (50, 81)):
        carry, after = 0.0, 0.0
        for first in reversed(range(start, end, 7)):
            last = min(first + 7, end)
            value = float(values[first])
            carry = float(rewards[first:last].double().sum()) + 0.97 * after - value + 0.97 * 0.9 * carry
            after = value
            expected[first:last] = carry
    assert_matches_reference(advantage, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_td_lambda_golden(backend: str) -> None:
    result = td_lambda(
        torch.tensor([9.0, 2.0, 4.0, 3.0]),
        torch.tensor([1.0, 0.0, 2.0, 1.0]),
        torch.tensor([1, 1, 1, 0]),
        torch.tensor([0, 3, 4]),
        discount=0.5,
        trace_lambda=0.25,
        bootstrap_S=torch.tensor([8.0, 5.0]),
        backend=backend,
    )
    # By hand: 2 + 0.5 * 8 = 6; 0.5 (0.75 * 4 + 0.25 * 6) = 2.25; 1 + 0.5 (0.75 * 2 + 0.25 * 2.25).
    assert result.tolist() == [2.03125, 2.25, 6.0, 0.0]


def test_td_lambda_is_the_target_of_gae() -> None:
    values, rewards, mask = torch.randn(40), torch.randn(40), torch.randint(0, 2, (40,))
    bounds, bootstrap = torch.tensor([0, 11, 11, 40]), torch.randn(3)
    for factor in (0.0, 0.7, 1.0):
        _, target = gae(values, rewards, mask, bounds, discount=0.9, gae_lambda=factor, bootstrap_S=bootstrap)
        ours = td_lambda(
            values, rewards, mask, bounds, discount=0.9, trace_lambda=factor, bootstrap_S=bootstrap
        )
        assert_matches_reference(ours, target)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_long_segment_among_short_ones(backend: str) -> None:
    lengths = [3, 20_000, 0, 1, 2, 5]
    decay, value = 0.9 + 0.1 * torch.rand(sum(lengths)), torch.randn(sum(lengths))
    bounds = cu_seqlens_of(lengths)
    scanned = segment_scan(decay, value, bounds, backend=backend)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        alone = segment_scan(
            decay[start:end], value[start:end], torch.tensor([0, end - start]), backend="reference"
        )
        assert torch.equal(scanned[start:end], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinity_stays_in_its_segment(backend: str) -> None:
    value = torch.tensor([1.0, 2.0, float("inf"), float("nan"), 5.0])
    result = segment_scan(torch.ones(5), value, torch.tensor([0, 2, 4, 5]), backend=backend)
    assert result[:2].tolist() == [3.0, 2.0]
    assert result[4] == 5.0
    assert not result[2:4].isfinite().any()


def test_everything_masked_is_zero() -> None:
    advantage, target = gae(torch.ones(3), torch.ones(3), torch.zeros(3), torch.tensor([0, 2, 3]))
    assert advantage.tolist() == target.tolist() == [0.0] * 3


def test_refuses_bad_arguments() -> None:
    with pytest.raises(ShapeError, match=r"discount must be in \[0.0, 1.0\], got 1.5"):
        discounted_return(torch.ones(1), torch.ones(1), torch.tensor([0, 1]), discount=1.5)
    with pytest.raises(ShapeError, match=r"bootstrap_S must have shape \[1\]"):
        discounted_return(torch.ones(1), torch.ones(1), torch.tensor([0, 1]), bootstrap_S=torch.ones(2))
    with pytest.raises(ShapeError, match="values_N must be on cpu like the other tensors, got meta"):
        gae(torch.ones(1, device="meta"), torch.ones(1), torch.ones(1), torch.tensor([0, 1]))
    with pytest.raises(ShapeError, match=r"turns_N must have shape \[1\]"):
        gae(torch.ones(1), torch.ones(1), torch.ones(1), torch.tensor([0, 1]), turns_N=torch.ones(2))
    with pytest.raises(ShapeError, match=r"trace_lambda must be in \[0.0, 1.0\], got -1.0"):
        td_lambda(torch.ones(1), torch.ones(1), torch.ones(1), torch.tensor([0, 1]), trace_lambda=-1.0)
    with pytest.raises(BackendError, match="segment_scan: backend 'triton' takes CUDA tensors"):
        segment_scan(torch.ones(1), torch.ones(1), torch.tensor([0, 1]), backend="triton")


ESTIMATORS: dict[str, Any] = {
    "gae": lambda case, **factors: gae(*case, gae_lambda=0.95, **factors),
    "td_lambda": lambda case, **factors: (td_lambda(*case, trace_lambda=0.7, **factors),),
    "vtrace": lambda case, **factors: vtrace(
        *case, log_ratio_N=case[0] * 0.8, gae_lambda=0.9, rho_cap=1.5, trace_cap=1.1, **factors
    ),
    "discounted_return": lambda case, **factors: (discounted_return(*case[1:], **factors),),
}


@pytest.mark.skipif(not native.available(), reason=native.description())
@pytest.mark.parametrize("bootstrapped", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_native_pass_has_the_bits_of_the_reference(estimator: str, bootstrapped: bool) -> None:
    lengths = [0, 1, 700, 0, 40_000, 3, *torch.randint(0, 90, (300,)).tolist(), 0]
    tokens = sum(lengths)
    mask = torch.rand(tokens) < 0.7
    mask[1:701] = False
    case = [torch.randn(tokens), torch.randn(tokens), mask, cu_seqlens_of(lengths)]
    for place in (~mask).nonzero()[::3, 0]:
        case[0][place] = case[1][place] = float("nan")
    bootstrap = torch.randn(len(lengths)) if bootstrapped else None
    expected, *results = (
        ESTIMATORS[estimator](case, discount=0.99, bootstrap_S=bootstrap, backend=backend)
        for backend in ("reference", "native", None)
    )
    for result in results:
        for ours, theirs in zip(result, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bounds", [[0, 2], [1, 3], [0, 2, 1, 3], []])
def test_refuses_bounds_that_are_none(bounds: list[int]) -> None:
    with pytest.raises(ShapeError, match="gae: cu_seqlens must be"):
        gae(torch.ones(3), torch.ones(3), torch.ones(3), torch.tensor(bounds, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"gae: rewards_N must have shape \[3\], got \[2\]"):
        gae(torch.ones(3), torch.ones(2), torch.ones(3), torch.tensor([0, 3]))
