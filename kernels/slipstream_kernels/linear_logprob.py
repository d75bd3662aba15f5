"""Floor 4. Log-probability, entropy and log-sum-exp of a linear head, without the logits of all rows at once.

Dimensions: N rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream_kernels import reference
from slipstream_kernels.checks import check_labels, check_shape
from slipstream_kernels.dispatch import Backend, choose
from slipstream_kernels.errors import ShapeError

IMPLEMENTED = (Backend.REFERENCE,)


def linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    inverse_temperature: float | Tensor = 1.0,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score labels under a linear head.

    With x = hidden @ weight.T + bias and z = inverse_temperature * softcap * tanh(x / softcap) (no
    tanh without softcap):

        logsumexp_n = ln sum_v exp z_nv,   logprob_n = z_n,label - logsumexp_n,   entropy_n = -sum_v
        p_nv ln p_nv

    hidden_NH: [N, H]; weight_VH: [V, H]; labels_N: [N] integers in [0, V); inverse_temperature:
    number or [N]; bias_V: [V], finite. Returns logprob_N, entropy_N, logsumexp_N: [N] float32
    (float64 for float64 input), nats. All three are differentiable in hidden, weight and bias,
    once. Logits are never rounded below float32, and memory is bounded by a chunk of rows. Raises
    ShapeError and BackendError. Source of the gradient: p = softmax(z); dz = g (1_label - p) -
    g_entropy p (ln p + entropy) + g_logsumexp p.
    """
    op = "linear_logprob"
    if (
        hidden_NH.ndim != 2
        or weight_VH.ndim != 2
        or hidden_NH.shape[1] != weight_VH.shape[1]
        or not weight_VH.numel()
    ):
        got = f"{list(hidden_NH.shape)} and {list(weight_VH.shape)}"
        raise ShapeError(f"{op}: hidden_NH and weight_VH must be [N, H] and [V, H] with V, H >= 1, got {got}")
    rows, vocabulary = hidden_NH.shape[0], weight_VH.shape[0]
    check_shape(op, "labels_N", labels_N, (rows,))
    check_labels(op, labels_N, vocabulary)
    if bias_V is not None:
        check_shape(op, "bias_V", bias_V, (vocabulary,))
    if softcap is not None and not softcap > 0.0:
        raise ShapeError(f"{op}: softcap must be positive or None, got {softcap}")
    choose(op, backend, implemented=IMPLEMENTED, device=hidden_NH.device.type)
    settings = reference.LogitSettings(
        inverse_temperature=_temperature(inverse_temperature, hidden_NH), softcap=softcap
    )
    return reference.linear_logprob(hidden_NH, weight_VH, labels_N, bias_V=bias_V, settings=settings)


def _temperature(inverse_temperature: float | Tensor, hidden_NH: Tensor) -> Tensor:
    dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
    if not isinstance(inverse_temperature, Tensor):
        if not 0.0 < inverse_temperature < float("inf"):
            raise ShapeError(
                f"linear_logprob: inverse_temperature must be positive, got {inverse_temperature}"
            )
        return torch.full((1,), inverse_temperature, dtype=dtype, device=hidden_NH.device)
    if inverse_temperature.requires_grad:
        raise ShapeError("linear_logprob: inverse_temperature must not require a gradient; detach it")
    check_shape("linear_logprob", "inverse_temperature", inverse_temperature, (hidden_NH.shape[0],))
    return inverse_temperature.to(dtype)
