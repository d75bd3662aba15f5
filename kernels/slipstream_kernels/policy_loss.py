"""Floor 4. The policy-gradient loss over packed tokens, its normaliser and its metrics.

Dimensions: N packed tokens, S segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream_kernels import native_policy, reference
from slipstream_kernels.checks import check_cu_seqlens, check_shape
from slipstream_kernels.dispatch import Backend, choose
from slipstream_kernels.errors import NativeError, ObjectiveError
from slipstream_kernels.objective import Objective
from slipstream_kernels.policy_inputs import checked_inputs, given_normalizer
from slipstream_kernels.policy_result import PolicyLoss

IMPLEMENTED = (Backend.TRITON, Backend.NATIVE, Backend.REFERENCE)


def policy_loss(
    logprob_N: Tensor,
    *,
    behavior_N: Tensor,
    proximal_N: Tensor | None = None,
    reference_N: Tensor | None = None,
    advantage_N: Tensor,
    weight_N: Tensor,
    cu_seqlens: Tensor,
    objective: Objective,
    entropy_N: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    backend: Backend | str | None = None,
) -> PolicyLoss:
    """Return the policy-gradient loss of packed tokens under an objective.

    With log-probabilities of the current, proximal, behavior and reference policy, and sg =
    stop-gradient:

        rho = sg exp(proximal - behavior)    at Objective.correction_level, then corrected
        r = exp(logprob - proximal)          at Objective.ratio_level
        L = rho surrogate(r, A) + kl_coefficient penalty(logprob - reference)
            - entropy_coefficient entropy

    Surrogate, Correction, Penalty and Level define their members; by default L is decoupled PPO's

        min(rho, importance_cap) max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

    Tokens have no surrogate where the correction masks them, or where its gradient would carry
    exp(logprob - behavior) further out of [trust_low, trust_high]; penalty and entropy keep theirs.
    Objective.aggregation combines the tokens; its denominators count them all. Log-ratios are clamped
    to +-20, outside of which r and the penalty have no gradient.

    logprob_N and all arguments ending in _N: [N]; cu_seqlens: [S + 1] segment bounds. weight_N: 0
    takes a token out whatever its other values, NaN and infinity included. proximal_N None stands
    for sg logprob_N (one update per batch); proximal_N = behavior_N gives PPO against the behavior
    policy. normalizer: the sum of batch_normalizer over all micro-batches of a batch, so that their
    losses and gradients sum to those of the whole batch; None: that of these tokens. `loss` is
    differentiable in logprob_N and entropy_N; everything else is constant. Raises ShapeError,
    ObjectiveError and BackendError. Sources: Hilton et al. 2021, arXiv:2110.00641, eq. 2, and the
    papers that Surrogate, Level, Correction and Penalty name.
    """
    op = "policy_loss"
    # The others compute in float32.
    implemented = (Backend.REFERENCE,) if logprob_N.dtype is torch.float64 else IMPLEMENTED
    chosen = choose(op, backend, implemented=implemented, device=logprob_N.device.type)
    inputs = checked_inputs(
        op, objective, tokens=logprob_N.numel(), logprob_N=logprob_N, behavior_N=behavior_N,
        proximal_N=proximal_N, reference_N=reference_N, entropy_N=entropy_N, advantage_N=advantage_N,
        weight_N=weight_N, cu_seqlens=cu_seqlens, native=chosen is Backend.NATIVE,
    )  # fmt: skip
    if objective.entropy_coefficient > 0 and entropy_N is None:
        raise ObjectiveError(f"{op}: entropy_N must be given when Objective.entropy_coefficient is positive")
    given = given_normalizer(op, normalizer, logprob_N.device)
    if chosen is Backend.NATIVE:
        try:
            return native_policy.policy_loss(inputs, objective, given)
        except NativeError:
            check_cu_seqlens(op, cu_seqlens, logprob_N.numel())
            raise
    divisor = given
    if divisor is None:
        divisor = reference.normalizer(inputs.weight_N, inputs.cu_seqlens, objective)
    if chosen is Backend.TRITON:
        # Loaded only here: Triton need not be installed.
        from slipstream_kernels.triton import policy_loss as triton

        return triton.policy_loss(inputs, objective, divisor)
    return reference.policy_loss(inputs, objective, divisor)


def batch_normalizer(weight_N: Tensor, cu_seqlens: Tensor, objective: Objective) -> Tensor:
    """Return [] float32: the denominator of these tokens under Objective.aggregation.

    token_mean: the sum of weights; sequence means: segments with a token of positive weight; fixed:
    S * fixed_length. It is additive over micro-batches that are cut between segments. weight_N:
    [N]; cu_seqlens: [S + 1]. Raises ShapeError.
    """
    check_shape("batch_normalizer", "weight_N", weight_N, (weight_N.numel(),))
    bounds = check_cu_seqlens("batch_normalizer", cu_seqlens, weight_N.numel())
    return reference.normalizer(weight_N, bounds, objective)
