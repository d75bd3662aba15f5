"""Floor 4. Advantages from whole trajectories: each reward relative to those of its group or its batch.

Nothing here is differentiable.

Dimensions: N packed tokens, G trajectories.
"""

from __future__ import annotations

import math
from enum import StrEnum

import torch
from torch import Tensor

from slipstream_kernels import reference
from slipstream_kernels.checks import check_range, check_shape
from slipstream_kernels.errors import ShapeError


class Baseline(StrEnum):
    """What is taken from a trajectory's reward R, within its group of n."""

    MEAN = "mean"
    """R - mean   (Dr. GRPO, arXiv:2503.20783)"""
    STD = "std"
    """(R - mean) / max(std, std_floor), std with n - 1   (GRPO, arXiv:2402.03300)"""
    RLOO = "rloo"
    """R - mean of the others = (R - mean) n / (n - 1)   (arXiv:2402.14740)"""
    LEAVE_ONE_OUT = "leave_one_out"
    """Another name of RLOO."""
    OPO = "opo"
    """R - mean weighted by length   (arXiv:2505.23585)"""
    REINFORCE_PP = "reinforce_pp"
    """R, whitened over the tokens of the batch; groups do not count   (REINFORCE++, arXiv:2501.03262)"""
    REINFORCE_PP_BASELINE = "reinforce_pp_baseline"
    """R - mean, then whitened over the tokens of the batch in groups whose rewards differ   (the same)"""


BY_LENGTH = (Baseline.OPO, Baseline.REINFORCE_PP, Baseline.REINFORCE_PP_BASELINE)
"""Baselines that need to know how long trajectories are."""


@torch.no_grad()
def whiten(values_N: Tensor, mask_N: Tensor, *, std_floor: float = 0.0) -> Tensor:
    """Return values with mean 0 and standard deviation 1 over the tokens of the batch.

        (value - mean) / max(std, std_floor),   mean and std (with n - 1) over tokens with mask != 0

    values_N, mask_N: [N]. Returns [N] float32, 0 outside the mask, and everywhere when all values
    are equal; REINFORCE++ is this on the tokens' returns. Raises ShapeError.
    """
    check_shape("whiten", "mask_N", mask_N, (values_N.numel(),))
    check_range("whiten", "std_floor", std_floor, 0.0, math.inf)
    chosen = mask_N.reshape(-1) != 0
    # Selected before any arithmetic: 0 * inf would be NaN.
    values = torch.where(chosen, values_N.reshape(-1).double(), 0.0)
    return reference.whiten(values, chosen.double(), std_floor=std_floor).float()


@torch.no_grad()
def group_advantage(
    rewards_G: Tensor,
    group_ids: Tensor,
    *,
    kind: Baseline | str = Baseline.MEAN,
    std_floor: float = 0.0,
    lengths_G: Tensor | None = None,
) -> Tensor:
    """Return each trajectory's reward relative to its group, or to the batch.

    rewards_G: [G] finite; group_ids: [G] integers, in any order; kind: a Baseline; std_floor: least
    divisor of "std" and of whitening; lengths_G: [G] positive numbers of sampled tokens, required by
    "opo", "reinforce_pp" and "reinforce_pp_baseline", and refused otherwise. Returns [G] float32;
    groups of one, and groups whose rewards are all equal, give exactly 0; for "reinforce_pp", which
    has no groups, a batch whose rewards are all equal does. Raises ShapeError.
    """
    op, size = "group_advantage", (rewards_G.numel(),)
    check_shape(op, "rewards_G", rewards_G, size)
    check_shape(op, "group_ids", group_ids, size)
    check_range(op, "std_floor", std_floor, 0.0, math.inf)
    if kind not in list(Baseline):
        raise ShapeError(f"{op}: kind must be one of {', '.join(Baseline)}, got {kind!r}")
    if (lengths_G is not None) is not (kind in BY_LENGTH):
        raise ShapeError(
            f"{op}: lengths_G must be given when kind is one of {', '.join(BY_LENGTH)}, and only then,"
            f" got kind {str(kind)!r}"
        )
    if not bool(torch.isfinite(rewards_G).all()):
        raise ShapeError(
            f"{op}: rewards_G must be finite, got {int((~torch.isfinite(rewards_G)).sum())} that are not"
        )
    if lengths_G is not None:
        check_shape(op, "lengths_G", lengths_G, size)
        check_range(op, "lengths_G", float(lengths_G.min()) if size[0] else 1.0, 1.0, math.inf)
    return reference.group_advantage(
        rewards_G, group_ids, kind=str(kind), std_floor=std_floor, lengths_G=lengths_G
    )
