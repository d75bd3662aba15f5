"""Floor 4. Advantages and returns over packed sequences, all on one affine reverse scan; and group baselines.

Tokens outside the mask (prompts, tool results) are skipped: the next token of a sampled token is
the next sampled one. Nothing here is differentiable.

Dimensions: N packed tokens, M of them sampled, S segments, G trajectories.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from slipstream_kernels import native, reference
from slipstream_kernels.checks import check_cu_seqlens, check_range, check_shape
from slipstream_kernels.dispatch import Backend, choose
from slipstream_kernels.errors import ShapeError

IMPLEMENTED = (Backend.NATIVE, Backend.REFERENCE)


class Baseline(StrEnum):
    """What is taken from a trajectory's reward R, within its group of n."""

    MEAN = "mean"
    """R - mean   (Dr. GRPO, arXiv:2503.20783)"""
    STD = "std"
    """(R - mean) / max(std, std_floor), std with n - 1   (GRPO, arXiv:2402.03300)"""
    RLOO = "rloo"
    """R - mean of the others = (R - mean) n / (n - 1)   (arXiv:2402.14740)"""
    OPO = "opo"
    """R - mean weighted by length   (arXiv:2505.23585)"""


@torch.no_grad()
def segment_scan(
    decay_N: Tensor, input_N: Tensor, cu_seqlens: Tensor, *, backend: Backend | str | None = None
) -> Tensor:
    """Return the affine reverse scan of each segment.

        output_t = input_t + decay_t * output_{t+1},   output_{t+1} = 0 after the end of a segment

    decay_N, input_N: [N]; cu_seqlens: [S + 1] segment bounds. Returns [N] float32, computed in
    float64: every backend gives the same bits. Raises ShapeError and BackendError.
    """
    op, tokens = "segment_scan", input_N.numel()
    check_shape(op, "input_N", input_N, (tokens,))
    check_shape(op, "decay_N", decay_N, (tokens,))
    bounds = check_cu_seqlens(op, cu_seqlens, tokens).contiguous()
    decay, value = decay_N.float().contiguous(), input_N.float().contiguous()
    if choose(op, backend, implemented=IMPLEMENTED, device=input_N.device.type) is Backend.REFERENCE:
        return reference.segment_scan(decay, value, bounds)
    output_N = torch.empty_like(value)
    native.segment_scan(
        decay.data_ptr(),
        value.data_ptr(),
        bounds.data_ptr(),
        segments=bounds.numel() - 1,
        tokens=tokens,
        threads=torch.get_num_threads(),
        output=output_N.data_ptr(),
    )
    return output_N


@torch.no_grad()
def gae(
    values_N: Tensor,
    rewards_N: Tensor,
    mask_N: Tensor,
    cu_seqlens: Tensor,
    *,
    discount: float = 1.0,
    gae_lambda: float = 1.0,
    bootstrap_S: Tensor | None = None,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return generalised advantage estimates and value targets.

        delta_t = r_t + discount V_{t+1} - V_t
        advantage_t = delta_t + discount gae_lambda advantage_{t+1},   target_t = advantage_t + V_t

    values_N, rewards_N, mask_N: [N], where t runs over tokens with mask != 0 and the others are
    ignored, their rewards too; bootstrap_S: [S] value after the last sampled token (0 when None:
    the episode ended). Returns advantage_N and target_N: [N] float32, 0 outside the mask. Raises
    ShapeError and BackendError. Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16.
    """
    op = "gae"
    _check_factors(op, discount=discount, gae_lambda=gae_lambda)
    steps = _Steps.of(op, mask_N, cu_seqlens)
    value, reward = steps.take(op, "values_N", values_N), steps.take(op, "rewards_N", rewards_N)
    delta = reward + discount * steps.following(op, value, bootstrap_S) - value
    advantage = segment_scan(
        torch.full_like(delta, discount * gae_lambda), delta, steps.bounds, backend=backend
    )
    return steps.spread(advantage), steps.spread(advantage + value)


@torch.no_grad()
def vtrace(
    values_N: Tensor,
    rewards_N: Tensor,
    mask_N: Tensor,
    cu_seqlens: Tensor,
    *,
    log_ratio_N: Tensor,
    discount: float = 1.0,
    gae_lambda: float = 1.0,
    rho_cap: float = 1.0,
    trace_cap: float = 1.0,
    bootstrap_S: Tensor | None = None,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return V-trace advantages and value targets under importance ratios rho = exp(log_ratio).

        delta_t = min(rho_cap, rho_t) (r_t + discount V_{t+1} - V_t)
        v_t - V_t = delta_t + discount gae_lambda min(trace_cap, rho_t) (v_{t+1} - V_{t+1})
        advantage_t = min(rho_cap, rho_t) (r_t + discount v_{t+1} - V_t)

    log_ratio_N: [N] current minus behavior log-probability; the other arguments are those of gae.
    Returns advantage_N and target_N = v: [N] float32, 0 outside the mask. Raises ShapeError and
    BackendError. Source: Espeholt et al. 2018, arXiv:1802.01561, eq. 1.
    """
    op = "vtrace"
    _check_factors(op, discount=discount, gae_lambda=gae_lambda)
    check_range(op, "rho_cap", rho_cap, 0.0, math.inf)
    check_range(op, "trace_cap", trace_cap, 0.0, math.inf)
    steps = _Steps.of(op, mask_N, cu_seqlens)
    value, reward = steps.take(op, "values_N", values_N), steps.take(op, "rewards_N", rewards_N)
    ratio = steps.take(op, "log_ratio_N", log_ratio_N).clamp(max=reference.MAX_LOG_RATIO).exp()
    rho, trace = ratio.clamp(max=rho_cap), ratio.clamp(max=trace_cap)
    delta = rho * (reward + discount * steps.following(op, value, bootstrap_S) - value)
    target = value + segment_scan(discount * gae_lambda * trace, delta, steps.bounds, backend=backend)
    advantage = rho * (reward + discount * steps.following(op, target, bootstrap_S) - value)
    return steps.spread(advantage), steps.spread(target)


@torch.no_grad()
def discounted_return(
    rewards_N: Tensor,
    mask_N: Tensor,
    cu_seqlens: Tensor,
    *,
    discount: float = 1.0,
    bootstrap_S: Tensor | None = None,
    backend: Backend | str | None = None,
) -> Tensor:
    """Return discounted returns to go: return_t = r_t + discount return_{t+1}, bootstrap_S at the end.

    Arguments as in gae. Returns [N] float32, 0 outside the mask. Raises ShapeError and
    BackendError.
    """
    op = "discounted_return"
    _check_factors(op, discount=discount)
    steps = _Steps.of(op, mask_N, cu_seqlens)
    reward = steps.take(op, "rewards_N", rewards_N)
    reward = reward + discount * steps.following(op, torch.zeros_like(reward), bootstrap_S)
    return steps.spread(
        segment_scan(torch.full_like(reward, discount), reward, steps.bounds, backend=backend)
    )


@torch.no_grad()
def group_advantage(
    rewards_G: Tensor,
    group_ids: Tensor,
    *,
    kind: Baseline | str = Baseline.MEAN,
    std_floor: float = 0.0,
    lengths_G: Tensor | None = None,
) -> Tensor:
    """Return each trajectory's reward relative to its group.

    rewards_G: [G] finite; group_ids: [G] integers, in any order; kind: a Baseline; std_floor: least
    divisor of "std"; lengths_G: [G] positive, required by "opo" and refused otherwise. Returns [G]
    float32; groups of one, and groups whose rewards are all equal, give exactly 0. Raises
    ShapeError.
    """
    op, size = "group_advantage", (rewards_G.numel(),)
    check_shape(op, "rewards_G", rewards_G, size)
    check_shape(op, "group_ids", group_ids, size)
    check_range(op, "std_floor", std_floor, 0.0, math.inf)
    if kind not in list(Baseline):
        raise ShapeError(f"{op}: kind must be one of {', '.join(Baseline)}, got {kind!r}")
    if (lengths_G is not None) is not (kind == Baseline.OPO):
        raise ShapeError(
            f"{op}: lengths_G must be given when kind is opo, and only then, got kind {str(kind)!r}"
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Steps:
    """The sampled tokens of packed segments, moved together."""

    rows: Tensor
    """[M] int64 positions in the packed axis."""
    bounds: Tensor
    """[S + 1] int64 segment bounds over the M tokens."""
    tokens: int
    """N."""

    @staticmethod
    def of(op: str, mask_N: Tensor, cu_seqlens: Tensor) -> _Steps:
        tokens = mask_N.numel()
        check_shape(op, "mask_N", mask_N, (tokens,))
        bounds = check_cu_seqlens(op, cu_seqlens, tokens)
        sampled = mask_N != 0
        before = torch.nn.functional.pad(sampled.cumsum(0), (1, 0))
        return _Steps(rows=sampled.nonzero()[:, 0], bounds=before[bounds], tokens=tokens)

    def take(self, op: str, name: str, tensor_N: Tensor) -> Tensor:
        """Return [M] float32 values at the sampled tokens."""
        check_shape(op, name, tensor_N, (self.tokens,))
        return tensor_N.float()[self.rows]

    def spread(self, values_M: Tensor) -> Tensor:
        """Return [N]: values at the sampled tokens, 0 elsewhere."""
        return values_M.new_zeros(self.tokens).index_copy(0, self.rows, values_M)

    def following(self, op: str, values_M: Tensor, bootstrap_S: Tensor | None) -> Tensor:
        """Return [M]: the value one token later, and the bootstrap value after a segment's last token."""
        shifted = torch.cat([values_M[1:], values_M.new_zeros(1)])[: values_M.numel()]
        filled = self.bounds.diff() > 0
        last = self.bounds[1:][filled] - 1
        if bootstrap_S is None:
            return shifted.index_fill(0, last, 0.0)
        check_shape(op, "bootstrap_S", bootstrap_S, (self.bounds.numel() - 1,))
        return shifted.index_copy(0, last, bootstrap_S.to(values_M)[filled])


def _check_factors(op: str, **factors: float) -> None:
    for name, factor in factors.items():
        check_range(op, name, factor, 0.0, 1.0)
