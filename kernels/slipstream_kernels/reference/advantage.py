"""Floor 1. Scans over packed segments and group baselines in plain PyTorch.

Dimensions: N packed tokens, S segments, G trajectories.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_scan(decay_N: Tensor, input_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return [N] float32: output_t = input_t + decay_t * output_{t+1}, 0 after the end of each segment.

    All segments advance together, aligned at their ends; float64 inside, rounded once per output.
    """
    output_N = torch.empty_like(input_N, dtype=torch.float32)
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    carry_S = torch.zeros(starts.numel(), dtype=torch.float64, device=input_N.device)
    for back in range(1, int((ends - starts).max()) + 1 if starts.numel() else 1):
        segments = (ends - starts >= back).nonzero()[:, 0]
        rows = ends[segments] - back
        carry = input_N[rows].double() + decay_N[rows].double() * carry_S[segments]
        carry_S[segments] = carry
        output_N[rows] = carry.float()
    return output_N


def group_advantage(
    rewards_G: Tensor, group_ids: Tensor, *, kind: str, std_floor: float, lengths_G: Tensor | None
) -> Tensor:
    """Return [G] float32 advantages; see the public op for the kinds."""
    _, group = torch.unique(group_ids, return_inverse=True)
    reward = rewards_G.double()
    zero = torch.zeros(
        int(group.max()) + 1 if group.numel() else 0, dtype=torch.float64, device=reward.device
    )

    def group_sum(values: Tensor) -> Tensor:
        return zero.index_add(0, group, values)[group]

    if kind == "reinforce_pp" and lengths_G is not None:
        return whiten(reward, lengths_G.double(), std_floor=std_floor).float()
    count = group_sum(torch.ones_like(reward))
    weight = lengths_G.double() if kind == "opo" and lengths_G is not None else torch.ones_like(reward)
    centred = reward - group_sum(weight * reward) / group_sum(weight)
    others = (count - 1).clamp(min=1)
    if kind in ("rloo", "leave_one_out"):
        centred = centred * count / others
    if kind == "std":
        spread = (group_sum(centred.square()) / others).sqrt()
        centred = centred / spread.clamp(min=max(std_floor, torch.finfo(torch.float64).tiny))
    # Compared exactly: rounding of the mean must not turn equal rewards into an advantage.
    highest = zero.scatter_reduce(0, group, reward, "amax", include_self=False)[group]
    lowest = zero.scatter_reduce(0, group, reward, "amin", include_self=False)[group]
    differs = highest > lowest
    if kind == "reinforce_pp_baseline" and lengths_G is not None:
        centred = whiten(centred, differs * lengths_G.double(), std_floor=std_floor)
    return torch.where(differs, centred, 0.0).float()


def whiten(values: Tensor, weights: Tensor, *, std_floor: float) -> Tensor:
    """Return (values - mean) / max(std, std_floor), each value counted `weights` times; float64.

    std divides by the sum of weights minus one. Where a weight is 0, and everywhere if all values are
    equal, the result is 0.
    """
    counted = weights > 0
    if not bool(counted.any()):
        return torch.zeros_like(values)
    total = weights.sum()
    mean = (weights * values).sum() / total
    centred = torch.where(counted, values - mean, 0.0)
    spread = ((weights * centred.square()).sum() / (total - 1).clamp(min=1)).sqrt()
    scaled = centred / spread.clamp(min=max(std_floor, torch.finfo(torch.float64).tiny))
    # Compared exactly: rounding of the mean must not turn equal values into an advantage.
    return torch.where(values[counted].max() > values[counted].min(), scaled, 0.0)
