"""Floor 3. The two Triton kernels of the policy loss: over a segment, and over a block of tokens.

Dimensions: N packed tokens, S segments, B blocks of tokens, K metrics.
"""

# Kernels are typed by the compiler, at launch.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from slipstream_kernels.policy_result import METRICS, NO_MINIMUM
from slipstream_kernels.triton.policy_terms import (
    BONUS,
    KL,
    TRUST_HIGH,
    TRUST_LOW,
    clamped,
    corrected,
    penalised,
    read,
    surrogate,
)

NAMES: Final = METRICS[:-2]
"""The K metrics that are summed, in the order in which the kernel stores them."""

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_NO_MINIMUM = tl.constexpr(NO_MINIMUM)

# Places of metrics; the k1, k2 and k3 of one policy are neighbours.
_LOSS = tl.constexpr(NAMES.index("loss_surrogate"))
_LOSS_KL = tl.constexpr(NAMES.index("loss_kl"))
_LOSS_ENTROPY = tl.constexpr(NAMES.index("loss_entropy"))
_RATIO = tl.constexpr(NAMES.index("ratio_sum"))
_RATIO_SQUARE = tl.constexpr(NAMES.index("ratio_square_sum"))
_BEHAVIOR = tl.constexpr(NAMES.index("log_ratio_sum"))
_IMPORTANCE = tl.constexpr(NAMES.index("importance_sum"))
_PROXIMAL = tl.constexpr(NAMES.index("proximal_log_ratio_sum"))
_REFERENCE = tl.constexpr(NAMES.index("reference_log_ratio_sum"))
_ENTROPY = tl.constexpr(NAMES.index("entropy_sum"))
_ADVANTAGE_POSITIVE = tl.constexpr(NAMES.index("advantage_positive_sum"))
_ADVANTAGE_NEGATIVE = tl.constexpr(NAMES.index("advantage_negative_sum"))
_TOKENS = tl.constexpr(NAMES.index("token_count"))
_POSITIVE = tl.constexpr(NAMES.index("positive_count"))
_NEGATIVE = tl.constexpr(NAMES.index("negative_count"))
_CLIPPED_POSITIVE = tl.constexpr(NAMES.index("clipped_positive_count"))
_CLIPPED_NEGATIVE = tl.constexpr(NAMES.index("clipped_negative_count"))
_DUAL_CLIPPED = tl.constexpr(NAMES.index("dual_clipped_count"))
_CAPPED = tl.constexpr(NAMES.index("capped_count"))
_REJECTED = tl.constexpr(NAMES.index("rejected_count"))
_MASKED = tl.constexpr(NAMES.index("masked_count"))
_PROXIMAL_COUNT = tl.constexpr(NAMES.index("proximal_count"))
_REFERENCE_COUNT = tl.constexpr(NAMES.index("reference_count"))
_ENTROPY_COUNT = tl.constexpr(NAMES.index("entropy_count"))


@triton.jit
def segment_kernel(
    logprob,
    behavior,
    proximal,
    weight,
    bounds,
    divisor,
    share_out,
    moved_out,
    mismatch_out,
    MOVED: tl.constexpr,
    MISMATCH: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write to each token of a segment: log-ratios at level MOVED and MISMATCH, and its share of the loss.

    MOVED: "" or the level of logprob - proximal; MISMATCH: "" or that of proximal - behavior; SHARE:
    whether shares are those of a mean over segments. proximal None stands for logprob.
    """
    segment = tl.program_id(0)
    first = tl.load(bounds + segment)
    last = tl.load(bounds + segment + 1)
    lane = tl.arange(0, BLOCK)
    moved = tl.zeros([BLOCK], tl.float32)
    mismatch = tl.zeros([BLOCK], tl.float32)
    heavy = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        offset = start + lane
        within = offset < last
        load = tl.load(weight + offset, mask=within, other=0.0).to(tl.float32)
        live = load > 0.0
        count += live.to(tl.float32)
        heavy += tl.where(live, load, 0.0)
        if MOVED != "" or MISMATCH != "":
            current = read(logprob, offset, within, live)
            base = current if proximal is None else read(proximal, offset, within, live)
            if MOVED != "":
                moved += current - base
            if MISMATCH != "":
                mismatch += base - read(behavior, offset, within, live)
    length = tl.maximum(tl.sum(count, 0), 1.0)
    whole_moved = tl.sum(moved, 0)
    whole_mismatch = tl.sum(mismatch, 0)
    if MOVED == "geometric":
        whole_moved = whole_moved / length
    if MISMATCH == "geometric":
        whole_mismatch = whole_mismatch / length
    whole_weight = tl.maximum(tl.sum(heavy, 0), _TINY)
    for start in range(first, last, BLOCK):
        offset = start + lane
        within = offset < last
        if MOVED != "":
            tl.store(moved_out + offset, tl.zeros([BLOCK], tl.float32) + whole_moved, mask=within)
        if MISMATCH != "":
            tl.store(mismatch_out + offset, tl.zeros([BLOCK], tl.float32) + whole_mismatch, mask=within)
        if SHARE:
            load = tl.load(weight + offset, mask=within, other=0.0).to(tl.float32)
            part = load / tl.maximum(tl.load(divisor), _TINY) / whole_weight
            tl.store(share_out + offset, tl.where(load > 0.0, part, 0.0), mask=within)


@triton.jit
def _put(place, index: tl.constexpr, value):
    tl.store(place + index, tl.sum(value.to(tl.float32), 0))


@triton.jit
def _put_nothing(place, index: tl.constexpr, count: tl.constexpr):
    for step in tl.static_range(count):
        tl.store(place + index + step, 0.0)


@triton.jit
def _put_divergences(place, index: tl.constexpr, log_ratio, sign: tl.constexpr):
    near = clamped(log_ratio)
    _put(place, index, near)
    _put(place, index + 1, 0.5 * near * near)
    _put(place, index + 2, tl.exp(sign * near) - 1.0 - sign * near)


@triton.jit
def token_kernel(
    logprob,
    behavior,
    proximal,
    reference,
    entropy,
    advantage_in,
    weight,
    divisor,
    share_in,
    moved_in,
    mismatch_in,
    coefficients,
    gradient_out,
    entropy_gradient_out,
    sums_out,
    extremes_out,
    tokens,
    SURROGATE: tl.constexpr,
    CORRECTION: tl.constexpr,
    PENALTY: tl.constexpr,
    METRICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write gradients of a block's tokens, its METRICS sums, and its greatest and negated least ratio.

    proximal, reference, entropy may be None; share_in, moved_in and mismatch_in are None unless the
    segment kernel has written them.
    """
    block = tl.program_id(0)
    offset = block * BLOCK + tl.arange(0, BLOCK)
    within = offset < tokens
    load = tl.load(weight + offset, mask=within, other=0.0).to(tl.float32)
    live = load > 0.0
    current = read(logprob, offset, within, live)
    behaved = read(behavior, offset, within, live)
    advantage = read(advantage_in, offset, within, live)
    base = current if proximal is None else read(proximal, offset, within, live)
    whole = tl.maximum(tl.load(divisor), _TINY)
    share = load / whole if share_in is None else read(share_in, offset, within, live)

    raw_log_ratio = clamped(current - behaved)
    raw_ratio = tl.exp(raw_log_ratio)
    share = tl.where(live, share, 0.0)
    place = sums_out + block * METRICS
    penalty_slope = tl.zeros([BLOCK], tl.float32)
    if reference is not None:
        drift = current - read(reference, offset, within, live)
        kl_coefficient = tl.load(coefficients + KL)
        if PENALTY == "k1_in_reward":
            advantage -= kl_coefficient * clamped(drift)
        value, slope = penalised(drift, PENALTY)
        penalty_slope = kl_coefficient * slope
        _put(place, _LOSS_KL, share * (kl_coefficient * value))
        _put_divergences(place, _REFERENCE, drift, -1.0)
        _put(place, _REFERENCE_COUNT, live)
    else:
        _put_nothing(place, _LOSS_KL, 1)
        _put_nothing(place, _REFERENCE, 3)
        _put_nothing(place, _REFERENCE_COUNT, 1)
    if proximal is not None:
        _put_divergences(place, _PROXIMAL, current - base, 1.0)
        _put(place, _PROXIMAL_COUNT, live)
    else:
        _put_nothing(place, _PROXIMAL, 3)
        _put_nothing(place, _PROXIMAL_COUNT, 1)
    if entropy is not None:
        weighted = -tl.load(coefficients + BONUS) * share
        uncertainty = read(entropy, offset, within, live)
        tl.store(entropy_gradient_out + offset, weighted, mask=within)
        _put(place, _LOSS_ENTROPY, weighted * uncertainty)
        _put(place, _ENTROPY, uncertainty)
        _put(place, _ENTROPY_COUNT, live)
    else:
        _put_nothing(place, _LOSS_ENTROPY, 1)
        _put_nothing(place, _ENTROPY, 1)
        _put_nothing(place, _ENTROPY_COUNT, 1)

    mismatch = base - behaved if mismatch_in is None else read(mismatch_in, offset, within, live)
    moved = current - base if moved_in is None else read(moved_in, offset, within, live)
    importance, capped, rejected = corrected(mismatch, coefficients, CORRECTION)
    loss, slope, bounded, dual = surrogate(moved, current, advantage, importance, coefficients, SURROGATE)
    positive, negative = advantage > 0.0, advantage < 0.0
    held = positive & (raw_ratio > tl.load(coefficients + TRUST_HIGH))
    held = held | (negative & (raw_ratio < tl.load(coefficients + TRUST_LOW)))
    free_share = tl.where(held, 0.0, share)
    tl.store(gradient_out + offset, free_share * slope + share * penalty_slope, mask=within)
    _put(place, _LOSS, free_share * loss)

    ratio = tl.where(live, raw_ratio, 0.0)
    _put(place, _RATIO, ratio)
    _put(place, _RATIO_SQUARE, ratio * ratio)
    _put_divergences(place, _BEHAVIOR, raw_log_ratio, 1.0)
    _put(place, _IMPORTANCE, tl.where(live, importance, 0.0))
    _put(place, _ADVANTAGE_POSITIVE, tl.where(positive, advantage, 0.0))
    _put(place, _ADVANTAGE_NEGATIVE, tl.where(negative, advantage, 0.0))
    _put(place, _TOKENS, live)
    _put(place, _POSITIVE, positive)
    _put(place, _NEGATIVE, negative)
    _put(place, _CLIPPED_POSITIVE, positive & bounded)
    _put(place, _CLIPPED_NEGATIVE, negative & bounded)
    _put(place, _DUAL_CLIPPED, dual)
    _put(place, _CAPPED, live & capped)
    _put(place, _REJECTED, live & rejected)
    _put(place, _MASKED, held)
    tl.store(extremes_out + 2 * block, tl.max(ratio, 0))
    tl.store(extremes_out + 2 * block + 1, -tl.min(tl.where(live, raw_ratio, _NO_MINIMUM), 0))
