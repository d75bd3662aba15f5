"""Floor 5. The whole RL head: hidden states to policy loss, only over rows that are trained.

Dimensions: N packed tokens, M of them with positive weight, H hidden, V vocabulary, S segments.
"""

from __future__ import annotations

from torch import Tensor

from slipstream_kernels.checks import check_shape
from slipstream_kernels.dispatch import Backend, choose
from slipstream_kernels.errors import ShapeError
from slipstream_kernels.linear_logprob import linear_logprob
from slipstream_kernels.objective import Objective, PolicyLoss
from slipstream_kernels.policy_loss import policy_loss

IMPLEMENTED = (Backend.REFERENCE,)


def linear_policy_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    inverse_temperature: float | Tensor = 1.0,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    behavior_N: Tensor,
    proximal_N: Tensor | None = None,
    reference_N: Tensor | None = None,
    advantage_N: Tensor,
    weight_N: Tensor,
    cu_seqlens: Tensor,
    objective: Objective,
    normalizer: Tensor | float | None = None,
    backend: Backend | str | None = None,
) -> PolicyLoss:
    """Return policy_loss of the labels' log-probabilities under a linear head.

        logprob, entropy, _ = linear_logprob(hidden, weight, labels, ...)   on the M rows with
        weight_N > 0 loss = policy_loss(logprob, entropy_N=entropy, ...)

    hidden_NH: [N, H], row n predicts labels_N[n]; weight_VH: [V, H]; arguments ending in _N: [N],
    as in linear_logprob and policy_loss. Labels of rows with weight 0 are never read, so they may
    be any number. `loss` backpropagates into hidden, weight and bias; entropy only when
    Objective.entropy_coefficient is positive. grad_logprob_N: [N]. Raises ShapeError,
    ObjectiveError and BackendError.
    """
    op = "linear_policy_loss"
    choose(op, backend, implemented=IMPLEMENTED, device=hidden_NH.device.type)
    if hidden_NH.ndim != 2:
        raise ShapeError(f"{op}: hidden_NH must have shape [N, H], got {list(hidden_NH.shape)}")
    count = hidden_NH.shape[0]
    check_shape(op, "labels_N", labels_N, (count,))
    check_shape(op, "weight_N", weight_N, (count,))
    rows = (weight_N > 0).nonzero()[:, 0]
    if isinstance(inverse_temperature, Tensor):
        check_shape(op, "inverse_temperature", inverse_temperature, (count,))
        inverse_temperature = inverse_temperature[rows]
    logprob, entropy, _ = linear_logprob(
        hidden_NH.index_select(0, rows),
        weight_VH,
        labels_N[rows],
        inverse_temperature=inverse_temperature,
        bias_V=bias_V,
        softcap=softcap,
    )
    # A detached entropy spares its gradient, which costs as much as that of the log-probability.
    entropy = entropy if objective.entropy_coefficient > 0 else entropy.detach()
    return policy_loss(
        _scatter(logprob, rows, count),
        behavior_N=behavior_N,
        proximal_N=proximal_N,
        reference_N=reference_N,
        advantage_N=advantage_N,
        weight_N=weight_N,
        cu_seqlens=cu_seqlens,
        objective=objective,
        entropy_N=_scatter(entropy, rows, count),
        normalizer=normalizer,
    )


def _scatter(values_M: Tensor, rows_M: Tensor, count: int) -> Tensor:
    """Return [count]: `values_M` at `rows_M`, 0 elsewhere."""
    return values_M.new_zeros(count).index_copy(0, rows_M, values_M)
