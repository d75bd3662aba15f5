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
    reference_N: Tensor | None = None, entropy_N: Tensor | None = None,
) -> reference.PolicyInputs:  # fmt: skip
    """Return the inputs of a policy loss over `tokens` packed tokens; raises ShapeError and ObjectiveError.

    A head that has yet to score them leaves out logprob_N; the behavior policy's then stand in its place.
    """
    given = {
        "logprob_N": logprob_N,
        "behavior_N": behavior_N,
        "proximal_N": proximal_N,
        "reference_N": reference_N,
        "entropy_N": entropy_N,
        "advantage_N": advantage_N,
        "weight_N": weight_N,
    }
    for name, tensor in given.items():
        if tensor is not None:
            check_shape(op, name, tensor, (tokens,))
    if objective.kl_coefficient > 0 and reference_N is None:
        raise ObjectiveError(f"{op}: reference_N must be given when Objective.kl_coefficient is positive")
    return reference.PolicyInputs(
        logprob_N=behavior_N if logprob_N is None else logprob_N,
        behavior_N=behavior_N,
        proximal_N=proximal_N,
        reference_N=reference_N,
        entropy_N=entropy_N,
        advantage_N=advantage_N,
        weight_N=weight_N.detach(),
        cu_seqlens=check_cu_seqlens(op, cu_seqlens, tokens),
    )


def divisor_of(
    op: str, inputs: reference.PolicyInputs, objective: Objective, normalizer: Tensor | float | None
) -> Tensor:
    """Return the [] denominator: the given one, or that of these tokens; raises ShapeError."""
    if normalizer is None:
        return reference.normalizer(inputs.weight_N, inputs.cu_seqlens, objective)
    if isinstance(normalizer, Tensor):
        check_shape(op, "normalizer", normalizer, ())
        return normalizer.detach().float()
    if not 0.0 < normalizer < float("inf"):
        raise ShapeError(f"{op}: normalizer must be positive and finite, got {normalizer}")
    return torch.tensor(normalizer, dtype=torch.float32, device=inputs.weight_N.device)
