"""Floor 3. The policy loss in Triton: one launch, or two when a token needs its whole segment.

Launch 1 (only then): a program a segment reduces log-ratios and weights, and writes what each of its
tokens needs. Launch 2: a program a block of tokens computes loss, gradients and its own metrics. Sums over
blocks follow in index order; nothing is atomic, nothing waits for the device.

Dimensions: N packed tokens, S segments, B blocks of tokens, K metrics.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream_kernels.objective import Aggregation, Level, Objective
from slipstream_kernels.policy_result import LOSSES, PolicyLoss, PolicyMetrics
from slipstream_kernels.reference.policy import PolicyInputs
from slipstream_kernels.triton.policy_kernels import NAMES, segment_kernel, token_kernel
from slipstream_kernels.triton.policy_terms import coefficients

TOKEN_BLOCK: Final = 256
"""Tokens of a program; with one warp its thirty sums need no shared memory and no barrier."""
TOKEN_WARPS: Final = 1
SEGMENT_BLOCK: Final = 1024
"""Tokens of a segment read at once."""
SEGMENT_WARPS: Final = 4


class _Loss(torch.autograd.Function):
    """Sums the parts of the loss; the backward pass scales gradients that the kernel has stored."""

    @staticmethod
    def forward(
        ctx: Any,
        logprob_N: Tensor,
        entropy_N: Tensor | None,
        parts: Tensor,
        gradient_N: Tensor,
        entropy_gradient_N: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(gradient_N, entropy_gradient_N)
        ctx.types = (logprob_N.dtype, None if entropy_N is None else entropy_N.dtype)
        return parts.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        gradient_N, entropy_gradient_N = ctx.saved_tensors
        logprob_type, entropy_type = ctx.types
        grad_logprob = (grad_loss * gradient_N).to(logprob_type) if ctx.needs_input_grad[0] else None
        grad_entropy = (grad_loss * entropy_gradient_N).to(entropy_type) if ctx.needs_input_grad[1] else None
        return grad_logprob, grad_entropy, None, None, None


def policy_terms(inputs: PolicyInputs, share_N: Tensor, objective: Objective) -> PolicyLoss:
    """Return what the reference's policy_terms returns: the pass over tokens whose shares are known."""
    return policy_loss(inputs, objective, share_N.new_ones(()), share_N)


def policy_loss(
    inputs: PolicyInputs, objective: Objective, divisor: Tensor, share_N: Tensor | None = None
) -> PolicyLoss:
    """Return what the reference returns, computed in float32 on the device of the inputs.

    divisor: [] the batch's normalizer; of no effect where share_N, the [N] shares of the loss, is given.
    """
    rows = inputs.logprob_N.numel()
    blocks = max(1, triton.cdiv(rows, TOKEN_BLOCK))
    fields = ("logprob_N", "behavior_N", "proximal_N", "reference_N", "entropy_N", "advantage_N", "weight_N")
    tensors = {name: _readable(getattr(inputs, name)) for name in fields}
    new = torch.empty(rows, dtype=torch.float32, device=inputs.logprob_N.device)
    gradient_N = torch.empty_like(new)
    entropy_gradient_N = None if inputs.entropy_N is None else torch.empty_like(new)
    sums_BK, extremes_B2 = new.new_empty(blocks, len(NAMES)), new.new_empty(blocks, 2)
    token_kernel[(blocks,)](
        *tensors.values(),
        divisor,
        *_segment_values(tensors, inputs.cu_seqlens, objective, divisor, share_N),
        coefficients(objective, new.device),
        gradient_N,
        entropy_gradient_N,
        sums_BK,
        extremes_B2,
        rows,
        SURROGATE=objective.surrogate.value,
        CORRECTION=objective.correction.value,
        PENALTY=objective.penalty.value,
        METRICS=len(NAMES),
        BLOCK=TOKEN_BLOCK,
        num_warps=TOKEN_WARPS,
        enable_fp_fusion=True,
    )
    sums_K, extremes = sums_BK.sum(0), extremes_B2.amax(0)
    loss: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
        inputs.logprob_N, inputs.entropy_N, sums_K[: len(LOSSES)], gradient_N, entropy_gradient_N
    )
    return PolicyLoss(
        loss=loss,
        grad_logprob_N=gradient_N,
        grad_entropy_N=entropy_gradient_N,
        metrics=PolicyMetrics(torch.cat((sums_K, extremes[:1], -extremes[1:]))),
    )


def _readable(tensor: Tensor | None) -> Tensor | None:
    """Return what a kernel can read: the tensor itself where it may be, which spares a call to PyTorch."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.detach().contiguous()


def _segment_values(
    tensors: dict[str, Any], cu_seqlens: Tensor, objective: Objective, divisor: Tensor, share_N: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return [N] shares, logprob - proximal and proximal - behavior, each None where a token has its own.

    Shares that are given stay as they are.
    """
    logprob_N, proximal_N = tensors["logprob_N"], tensors["proximal_N"]
    shared = share_N is None and objective.aggregation is Aggregation.SEQUENCE_MEAN_TOKEN_MEAN
    # Without a proximal policy every ratio to it is 1, over whatever it is taken.
    moved = "" if proximal_N is None or objective.ratio_level is Level.TOKEN else objective.ratio_level.value
    mismatch = "" if objective.correction_level is Level.TOKEN else objective.correction_level.value
    if not (shared or moved or mismatch) or not logprob_N.numel():
        return share_N, None, None
    fresh_N, moved_N, mismatch_N = (
        torch.empty_like(logprob_N, dtype=torch.float32) if wanted else None
        for wanted in (shared, moved, mismatch)
    )
    segment_kernel[(cu_seqlens.numel() - 1,)](
        logprob_N,
        tensors["behavior_N"],
        proximal_N,
        tensors["weight_N"],
        cu_seqlens.contiguous(),
        divisor,
        fresh_N,
        moved_N,
        mismatch_N,
        MOVED=moved,
        MISMATCH=mismatch,
        SHARE=shared,
        BLOCK=SEGMENT_BLOCK,
        num_warps=SEGMENT_WARPS,
        enable_fp_fusion=True,
    )
    return fresh_N if shared else share_N, moved_N, mismatch_N
