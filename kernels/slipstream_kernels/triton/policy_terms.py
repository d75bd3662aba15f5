"""Floor 3. The parts of a token's loss in Triton: reading, ratios and their correction, surrogate, penalty.

The same parts as in reference/surrogate.py; all take and return blocks of tokens.
"""

# Kernels are typed by the compiler, at launch.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream_kernels.objective import Objective
from slipstream_kernels.reference.surrogate import MAX_LOG_RATIO

_LIMIT = tl.constexpr(MAX_LOG_RATIO)
# Places of coefficients.
_CLIP_BELOW = tl.constexpr(0)
_CLIP_ABOVE = tl.constexpr(1)
_DUAL_CLIP = tl.constexpr(2)
_GATE_POSITIVE = tl.constexpr(3)
_GATE_NEGATIVE = tl.constexpr(4)
_CAP = tl.constexpr(5)
_FLOOR = tl.constexpr(6)
TRUST_LOW = tl.constexpr(7)
TRUST_HIGH = tl.constexpr(8)
KL = tl.constexpr(9)
BONUS = tl.constexpr(10)


@lru_cache(maxsize=64)
def coefficients(objective: Objective, device: torch.device) -> Tensor:
    """Return [11] float32, kept for each objective: a copy to the device would wait for it."""
    values = (
        1.0 - objective.clip_low,
        1.0 + objective.clip_high,
        objective.dual_clip,
        objective.gate_positive,
        objective.gate_negative,
        objective.importance_cap,
        objective.importance_floor,
        objective.trust_low,
        objective.trust_high,
        objective.kl_coefficient,
        objective.entropy_coefficient,
    )
    return torch.tensor(values, dtype=torch.float32, device=device)


@triton.jit
def _within(value, low, high):
    # Not tl.minimum and tl.maximum: they drop NaN, which must reach the loss.
    return tl.where(value < low, low, tl.where(value > high, high, value))


@triton.jit
def clamped(log_ratio):
    return _within(log_ratio, -_LIMIT, _LIMIT)


@triton.jit
def read(pointer, offset, within, live):
    # Selected after loading: a mask made of data would split wide loads. Dead tokens may hold NaN.
    return tl.where(live, tl.load(pointer + offset, mask=within, other=0.0).to(tl.float32), 0.0)


@triton.jit
def corrected(log_ratio, coefficients, CORRECTION: tl.constexpr):
    """Return [block] importance, whether it was truncated, whether it was masked."""
    cap = tl.load(coefficients + _CAP)
    ratio = tl.exp(clamped(log_ratio))
    above = ratio > cap
    never = tl.zeros(ratio.shape, tl.int1)
    if CORRECTION == "truncate":
        return tl.where(above, cap, ratio), above, never
    elif CORRECTION == "mask":
        out = above | (ratio < tl.load(coefficients + _FLOOR))
        return tl.where(out, 0.0, ratio), never, out
    else:
        return tl.full(ratio.shape, 1.0, tl.float32), never, never


@triton.jit
def surrogate(log_ratio, logprob, advantage, importance, coefficients, SURROGATE: tl.constexpr):
    """Return [block] loss, slope, whether a bound and whether the dual clip took effect.

    log_ratio: current / proximal at its level, not clamped. Formulas and sources: objective.Surrogate.
    """
    low = tl.load(coefficients + _CLIP_BELOW)
    high = tl.load(coefficients + _CLIP_ABOVE)
    ratio = tl.exp(clamped(log_ratio))
    stuck = tl.abs(log_ratio) > _LIMIT
    factor = -importance * advantage
    never = tl.zeros(ratio.shape, tl.int1)
    if SURROGATE == "clip":
        dual_clip = tl.load(coefficients + _DUAL_CLIP)
        bounded = tl.where(advantage >= 0.0, ratio > high, ratio < low)
        dual = (advantage < 0.0) & (ratio > dual_clip)
        bound = tl.where(dual, dual_clip, _within(ratio, low, high))
        still = bounded | dual
        loss = factor * tl.where(still, bound, ratio)
        return loss, tl.where(still | stuck, 0.0, factor * ratio), bounded, dual
    elif SURROGATE == "cispo":
        slope = factor * _within(ratio, low, high)
        return slope * logprob, slope, (ratio < low) | (ratio > high), never
    elif SURROGATE == "topr":
        harmful = advantage < 0.0
        slope = factor * tl.where(harmful, _within(ratio, 0.0, 1.0), 1.0)
        return slope * logprob, slope, harmful & (ratio > 1.0), never
    else:
        tl.static_assert(SURROGATE == "sapo")
        hot = tl.load(coefficients + _GATE_POSITIVE)
        heat = tl.where(advantage > 0.0, hot, tl.load(coefficients + _GATE_NEGATIVE))
        gate = 1.0 / (1.0 + tl.exp(-heat * (ratio - 1.0)))
        slope = factor * 4.0 * gate * (1.0 - gate) * ratio
        return factor * 4.0 / heat * gate, tl.where(stuck, 0.0, slope), never, never


@triton.jit
def penalised(drift, PENALTY: tl.constexpr):
    """Return [block] value and slope of the penalty in the loss, in nats; `drift` is not clamped."""
    near = clamped(drift)
    stuck = tl.abs(drift) > _LIMIT
    if PENALTY == "k2":
        return 0.5 * near * near, tl.where(stuck, 0.0, near)
    elif PENALTY == "k3":
        inverse = tl.exp(-near)
        return inverse - 1.0 + near, tl.where(stuck, 0.0, 1.0 - inverse)
    elif PENALTY == "k3_with_k2_gradient":
        return tl.exp(-near) - 1.0 + near, tl.where(stuck, 0.0, near)
    else:
        tl.static_assert(PENALTY == "k1_in_reward")
        return tl.zeros_like(near), tl.zeros_like(near)
