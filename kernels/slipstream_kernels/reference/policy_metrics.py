"""Floor 1. What one pass of the policy loss counts, as sums that merge over passes.

Dimensions: N packed tokens, K metrics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream_kernels.policy_result import NO_MINIMUM
from slipstream_kernels.reference.surrogate import Corrected, Term


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pass:
    """[N] what the pass has computed, detached; 0 at tokens that are not live, ratios and flags aside."""

    live: Tensor
    held: Tensor
    """Whether the trust region holds the surrogate back."""
    advantage: Tensor
    raw_ratio: Tensor
    raw_log_ratio: Tensor
    moved: Tensor | None
    """Current / proximal log-ratio."""
    drift: Tensor | None
    """Current / reference log-ratio."""
    entropy: Tensor | None
    weight: Corrected
    surrogate: Term


def metrics_of(seen: Pass) -> Tensor:
    """Return [K] metrics of live tokens, in the order of METRICS, without the three losses."""
    live, ratio = seen.live, torch.where(seen.live, seen.raw_ratio, 0.0)
    nothing = torch.zeros_like(ratio)
    divergences = _divergences(seen.raw_log_ratio, seen.raw_ratio)
    moved = (nothing,) * 3 if seen.moved is None else _divergences(seen.moved, seen.moved.exp())
    drift = (nothing,) * 3 if seen.drift is None else _divergences(seen.drift, (-seen.drift).exp(), sign=-1.0)
    sums = (
        ratio,
        ratio.square(),
        *divergences,
        torch.where(live, seen.weight.importance, 0.0),
        *moved,
        *drift,
        nothing if seen.entropy is None else seen.entropy,
        seen.advantage.clamp(min=0.0),
        seen.advantage.clamp(max=0.0),
    )
    counted = torch.stack(_flags(seen)).sum(1).to(ratio.dtype)
    most = ratio.amax() if ratio.numel() else ratio.new_zeros(())
    every = torch.where(live, seen.raw_ratio, NO_MINIMUM)
    least = every.amin() if ratio.numel() else ratio.new_full((), NO_MINIMUM)
    return torch.cat((torch.stack(sums).sum(1), counted, torch.stack((most, least))))


def _divergences(log_ratio: Tensor, ratio: Tensor, sign: float = 1.0) -> tuple[Tensor, ...]:
    """Return d, k2 = d^2 / 2 and k3 = ratio - 1 - sign d, where ratio = exp(sign d)."""
    return log_ratio, 0.5 * log_ratio.square(), ratio - 1.0 - sign * log_ratio


def _flags(seen: Pass) -> tuple[Tensor, ...]:
    live, never = seen.live, torch.zeros_like(seen.live)
    positive, negative = seen.advantage > 0, seen.advantage < 0
    bounded = never if seen.surrogate.bounded is None else seen.surrogate.bounded
    dual = never if seen.surrogate.dual is None else seen.surrogate.dual
    return (
        live,
        positive,
        negative,
        positive & bounded,
        negative & bounded,
        dual,
        never if seen.weight.capped is None else live & seen.weight.capped,
        never if seen.weight.rejected is None else live & seen.weight.rejected,
        seen.held,
        never if seen.moved is None else live,
        never if seen.drift is None else live,
        never if seen.entropy is None else live,
    )
