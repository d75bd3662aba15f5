"""Group and batch baselines against golden values and float64."""

from __future__ import annotations

import pytest
import torch

from slipstream_kernels import Baseline, ShapeError, group_advantage, whiten
from slipstream_kernels.testing import assert_matches_reference


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Baseline.MEAN, [0.5, -0.5, -0.5, 0.5]),
        (Baseline.STD, [0.866025, -0.866025, -0.866025, 0.866025]),
        (Baseline.RLOO, [0.666667, -0.666667, -0.666667, 0.666667]),
        (Baseline.LEAVE_ONE_OUT, [0.666667, -0.666667, -0.666667, 0.666667]),
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


def test_reinforce_pp_whitens_over_the_tokens_of_the_batch() -> None:
    rewards, lengths = torch.tensor([1.0, 0.0]), torch.tensor([3, 2])
    for kind in (Baseline.REINFORCE_PP, Baseline.REINFORCE_PP_BASELINE):
        # By hand, of five tokens: mean 0.6 (or 0.1), variance (3 * 0.16 + 2 * 0.36) / 4 = 0.3.
        result = group_advantage(rewards, torch.tensor([0, 0]), kind=kind, lengths_G=lengths)
        assert result.tolist() == pytest.approx([0.730297, -1.095445], abs=1e-6)
    apart = {"group_ids": torch.tensor([0, 1]), "lengths_G": lengths}
    assert group_advantage(rewards, kind="reinforce_pp", **apart).tolist() == pytest.approx(
        [0.730297, -1.095445], abs=1e-6
    )
    assert group_advantage(rewards, kind="reinforce_pp_baseline", **apart).tolist() == [0.0, 0.0]


def test_groups_of_equal_rewards_take_no_part_in_whitening() -> None:
    rewards = torch.tensor([1.0, 0.0, 5.0, 5.0, 7.0])
    groups, lengths = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([3, 2, 100, 50, 9])
    result = group_advantage(rewards, groups, kind="reinforce_pp_baseline", lengths_G=lengths)
    assert result.tolist() == pytest.approx([0.730297, -1.095445, 0, 0, 0], abs=1e-6)
    assert result[2:].tolist() == [0.0] * 3
    equal = group_advantage(torch.full((3,), 0.1), groups[:3], kind="reinforce_pp", lengths_G=lengths[:3])
    assert equal.tolist() == [0.0] * 3


def test_whiten_equals_reinforce_pp_token_by_token() -> None:
    rewards, lengths = torch.randn(6), torch.tensor([3, 1, 4, 1, 5, 9])
    tokens = rewards.repeat_interleave(lengths)
    whitened = whiten(tokens, torch.ones(23))
    expected = (tokens.double() - tokens.double().mean()) / tokens.double().std()
    assert_matches_reference(whitened, expected)
    by_trajectory = group_advantage(rewards, torch.arange(6), kind="reinforce_pp", lengths_G=lengths)
    assert_matches_reference(by_trajectory.repeat_interleave(lengths), expected)


def test_whiten_ignores_what_is_masked() -> None:
    values = torch.tensor([1.0, float("nan"), 3.0, float("inf")])
    assert whiten(values, torch.tensor([1, 0, 1, 0])).tolist() == pytest.approx([-0.707107, 0, 0.707107, 0])
    assert whiten(values, torch.zeros(4)).tolist() == [0.0] * 4
    assert whiten(values[::2], torch.ones(2), std_floor=10.0).tolist() == pytest.approx([-0.1, 0.1])
    assert whiten(torch.full((3,), 0.1), torch.ones(3)).tolist() == [0.0] * 3


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
    with pytest.raises(ShapeError, match=r"kind must be one of mean, std, rloo, .*, got 'median'"):
        group_advantage(torch.tensor([1.0]), one, kind="median")
    with pytest.raises(ShapeError, match="lengths_G must be given when kind is one of opo"):
        group_advantage(torch.tensor([1.0]), one, kind="opo")
    with pytest.raises(ShapeError, match=r"mask_N must have shape \[2\], got \[3\]"):
        whiten(torch.ones(2), torch.ones(3))
