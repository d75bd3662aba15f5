"""Floor 3. What a policy loss reads, checked: shared by policy_loss and the fused head.

Dimensions: N packed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream_kernels import reference
from slipstream_kernels.checks import check_cu_seqlens, check_shape
from slipstream_kernels.errors import ObjectiveError, ShapeError
from slipstream_kernels.objective import Objective


def checked_inputs(
    op: str, objective: Objective, *, tokens: int, behavior_N: Tensor, advantage_N: Tensor, weight_N: Tensor,
    cu_seqlens: Tensor, logprob_N: Tensor | None = None, proximal_N: Tensor | None = None,
    reference_N: Tensor | None = None, entropy_N: Tensor | None = None, native: bool,
) -> reference.PolicyInputs:  # fmt: skip
    """Return the inputs of a policy loss over `tokens` packed tokens; raises ShapeError and ObjectiveError.

    A head that has yet to score them leaves out logprob_N; the behavior policy's then stand in its place.
    With `native` the values of cu_seqlens are left to the native library.
    """
    shape = (tokens,)
    for name, tensor in (
        ("logprob_N", logprob_N),
        ("behavior_N", behavior_N),
        ("proximal_N", proximal_N),
        ("reference_N", reference_N),
        ("entropy_N", entropy_N),
        ("advantage_N", advantage_N),
        ("weight_N", weight_N),
    ):
        if tensor is not None and tensor.shape != shape:
            check_shape(op, name, tensor, shape)
    if objective.kl_coefficient > 0 and reference_N is None:
        raise ObjectiveError(f"{op}: reference_N must be given when Objective.kl_coefficient is positive")
    return reference.PolicyInputs(
        logprob_N=behavior_N if logprob_N is None else logprob_N,
        behavior_N=behavior_N,
        proximal_N=proximal_N,
        reference_N=reference_N,
        entropy_N=entropy_N,
        advantage_N=advantage_N,
        weight_N=weight_N.detach() if weight_N.requires_grad else weight_N,
        cu_seqlens=check_cu_seqlens(op, cu_seqlens, tokens, values=not native),
    )


def given_normalizer(op: str, normalizer: Tensor | float | None, device: torch.device) -> Tensor | None:
    """Return a given denominator as a [] tensor, None for None; raises ShapeError."""
    if normalizer is None:
        return None
    if isinstance(normalizer, Tensor):
        check_shape(op, "normalizer", normalizer, ())
        return normalizer.detach().float()
    if not 0.0 < normalizer < float("inf"):
        raise ShapeError(f"{op}: normalizer must be positive and finite, got {normalizer}")
    return torch.full((), normalizer, dtype=torch.float32, device=device)


def own_shares(inputs: reference.PolicyInputs, objective: Objective, normalizer: Tensor | None) -> Tensor:
    """Return [N] shares under the given denominator, or under that of these tokens."""
    if normalizer is None:
        normalizer = reference.normalizer(inputs.weight_N, inputs.cu_seqlens, objective)
    return reference.token_shares(inputs.weight_N, inputs.cu_seqlens, objective, normalizer)
