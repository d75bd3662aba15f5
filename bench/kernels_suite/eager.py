"""The ops as one writes them in plain PyTorch, with autograd: what every ratio refers to, and float64 truth.

Written for this benchmark alone: nothing here comes from slipstream_kernels. Given float64 inputs it computes
in float64, which is what errors refer to.

Dimensions: N packed tokens, M trained ones, H hidden, V vocabulary, S segments, T longest segment.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

CLIP: Final = 0.2
FP8_MAX: Final = 448.0


def logprob_entropy(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return [N] log-probability of the labels and [N] entropy, the entropy without a gradient."""
    logits_NV = hidden_NH @ weight_VH.T
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    logprob_NV = torch.log_softmax(logits_NV.to(wide), dim=-1)
    chosen_N = logprob_NV.gather(1, labels_N[:, None])[:, 0]
    with torch.no_grad():
        entropy_N = -(logprob_NV.exp() * logprob_NV).sum(-1)
    return chosen_N, entropy_N


def clipped_loss(logprob_N: Tensor, behavior_N: Tensor, advantage_N: Tensor, weight_N: Tensor) -> Tensor:
    """Return PPO's clipped loss against the behavior policy, the mean over tokens of weight 1."""
    ratio = (logprob_N - behavior_N).exp()
    surrogate = torch.maximum(-advantage_N * ratio, -advantage_N * ratio.clamp(1 - CLIP, 1 + CLIP))
    return (surrogate * weight_N).sum() / weight_N.sum()


def selected_logprob(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, rows: int = 512) -> Tensor:
    """Return [N] log-probabilities, a few rows at a time and without gradient: to make inputs."""
    with torch.no_grad():
        parts = [
            logprob_entropy(hidden_NH[at : at + rows], weight_VH, labels_N[at : at + rows])[0]
            for at in range(0, hidden_NH.shape[0], rows)
        ]
    return torch.cat(parts).float()


def head_kl(
    hidden_p_NH: Tensor, weight_p_VH: Tensor, hidden_q_NH: Tensor, weight_q_VH: Tensor
) -> tuple[Tensor, Tensor]:
    """Return [N] KL(p || q) over the whole vocabulary and [N] entropy of p."""
    p_NV, q_NV = hidden_p_NH @ weight_p_VH.T, hidden_q_NH @ weight_q_VH.T
    wide = torch.promote_types(p_NV.dtype, torch.float32)
    log_p, log_q = torch.log_softmax(p_NV.to(wide), -1), torch.log_softmax(q_NV.to(wide), -1)
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), -(p * log_p).sum(-1).detach()


def padded(values_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return [T, S]: the segments as columns, 0 after their ends."""
    lengths = cu_seqlens.diff()
    longest = int(lengths.max())
    inside_ST = torch.arange(longest, device=values_N.device)[None] < lengths[:, None]
    out_ST = values_N.new_zeros(lengths.numel(), longest)
    out_ST[inside_ST] = values_N
    return out_ST.T


def packed(values_TS: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return [N]: the inverse of padded."""
    lengths = cu_seqlens.diff()
    inside_ST = torch.arange(values_TS.shape[0], device=values_TS.device)[None] < lengths[:, None]
    return values_TS.T[inside_ST]


def vtrace_loop(
    values_N: Tensor,
    rewards_N: Tensor,
    mask_N: Tensor,
    cu_seqlens: Tensor,
    *,
    discount: float,
    gae_lambda: float,
    log_ratio_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return [N] advantages and targets: GAE, or V-trace with caps of 1 when `log_ratio_N` is given.

    A loop over time, all segments side by side, as trainers write it; tokens outside the mask pass it on.
    """
    value, reward = padded(values_N, cu_seqlens), padded(rewards_N, cu_seqlens)
    mask = padded(mask_N.to(value.dtype), cu_seqlens) > 0
    rho = torch.ones_like(value)
    if log_ratio_N is not None:
        rho = padded(log_ratio_N, cu_seqlens).exp().clamp(max=1.0)
    next_value, carry = torch.zeros_like(value[0]), torch.zeros_like(value[0])
    next_target = torch.zeros_like(value[0])
    advantages, targets = torch.zeros_like(value), torch.zeros_like(value)
    for t in reversed(range(value.shape[0])):
        delta = rho[t] * (reward[t] + discount * next_value - value[t])
        moved = delta + discount * gae_lambda * rho[t] * carry
        advantage = moved if log_ratio_N is None else rho[t] * (reward[t] + discount * next_target - value[t])
        target = value[t] + moved
        advantages[t], targets[t] = advantage * mask[t], target * mask[t]
        carry = torch.where(mask[t], moved, carry)
        next_value = torch.where(mask[t], value[t], next_value)
        next_target = torch.where(mask[t], target, next_target)
    return packed(advantages, cu_seqlens), packed(targets, cu_seqlens)


def td_lambda_loop(
    values_N: Tensor,
    rewards_N: Tensor,
    mask_N: Tensor,
    cu_seqlens: Tensor,
    *,
    discount: float,
    trace_lambda: float,
) -> Tensor:
    """Return [N] lambda-returns of the tokens in the mask: the targets of GAE."""
    factors = {"discount": discount, "gae_lambda": trace_lambda}
    return vtrace_loop(values_N, rewards_N, mask_N, cu_seqlens, **factors)[1]


def token_loop_gae(
    values_N: Tensor,
    rewards_N: Tensor,
    mask_N: Tensor,
    cu_seqlens: Tensor,
    *,
    discount: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Return GAE's advantages and targets from a Python loop over tokens, on elements of the tensors."""
    advantages, targets = torch.zeros_like(values_N), torch.zeros_like(values_N)
    mask, bounds = mask_N.tolist(), cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        next_value = carry = values_N.new_zeros(())
        for t in reversed(range(start, end)):
            if mask[t]:
                delta = rewards_N[t] + discount * next_value - values_N[t]
                carry, next_value = delta + discount * gae_lambda * carry, values_N[t]
                advantages[t], targets[t] = carry, carry + values_N[t]
    return advantages, targets


def float_loop_gae(
    values_N: Tensor,
    rewards_N: Tensor,
    mask_N: Tensor,
    cu_seqlens: Tensor,
    *,
    discount: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Return GAE's advantages and targets from a Python loop over tokens, on lists of Python's floats."""
    values, rewards, mask, bounds = (x.tolist() for x in (values_N, rewards_N, mask_N, cu_seqlens))
    advantages, targets = [0.0] * len(values), [0.0] * len(values)
    for start, end in pairwise(bounds):
        next_value = carry = 0.0
        for t in range(end - 1, start - 1, -1):
            if mask[t]:
                carry = rewards[t] + discount * next_value - values[t] + discount * gae_lambda * carry
                next_value = values[t]
                advantages[t], targets[t] = carry, carry + next_value
    return values_N.new_tensor(advantages), values_N.new_tensor(targets)


def affine_loop(decay_N: Tensor, input_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return [N] output_t = input_t + decay_t output_{t+1} within segments: a loop over time."""
    decay, value = padded(decay_N, cu_seqlens), padded(input_N, cu_seqlens)
    carry, out = torch.zeros_like(value[0]), torch.zeros_like(value)
    for t in reversed(range(value.shape[0])):
        carry = value[t] + decay[t] * carry
        out[t] = carry
    return packed(out, cu_seqlens)


def return_loop(rewards_N: Tensor, mask_N: Tensor, cu_seqlens: Tensor, *, discount: float) -> Tensor:
    """Return [N] discounted returns of the tokens in the mask: a loop over time."""
    reward, mask = padded(rewards_N, cu_seqlens), padded(mask_N.to(rewards_N.dtype), cu_seqlens) > 0
    carry, out = torch.zeros_like(reward[0]), torch.zeros_like(reward)
    for t in reversed(range(reward.shape[0])):
        moved = reward[t] + discount * carry
        out[t] = moved * mask[t]
        carry = torch.where(mask[t], moved, carry)
    return packed(out, cu_seqlens)


def group_loop(rewards_G: Tensor, group_ids: Tensor) -> Tensor:
    """Return [G] rewards minus their group's mean, over its standard deviation: a loop over groups."""
    members: dict[int, list[int]] = {}
    for index, group in enumerate(group_ids.tolist()):
        members.setdefault(group, []).append(index)
    advantage_G = torch.zeros_like(rewards_G)
    for indices in members.values():
        rewards = rewards_G[indices]
        advantage_G[indices] = (rewards - rewards.mean()) / rewards.std()
    return advantage_G


def changed_pairs(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Return int32 positions and new values of the elements whose bits differ."""
    changed = old.view(torch.int16).flatten() != new.view(torch.int16).flatten()
    positions = changed.nonzero()[:, 0]
    return positions.to(torch.int32), new.flatten()[positions]


def apply_pairs(base: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Return `base` with the values at the positions."""
    return base.flatten().index_copy(0, positions.long(), values).view_as(base)


def fp8_blocks(weight_VH: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """Return float8 values and the scale of each block, such that value * scale is the weight."""
    rows, columns = weight_VH.shape
    blocks = weight_VH.float().view(rows // block, block, columns // block, block)
    scale = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-12) / FP8_MAX
    values = (blocks / scale).to(torch.float8_e4m3fn).view(rows, columns)
    return values, scale[:, 0, :, 0]
