"""Floor 4. Divergence of two linear heads over the full vocabulary, without the logits of all rows at once.

Dimensions: N rows, H and K hidden sizes of p and q, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream_kernels import reference
from slipstream_kernels.checks import check_labels, check_shape
from slipstream_kernels.dispatch import Backend, choose
from slipstream_kernels.errors import ShapeError
from slipstream_kernels.reference import Direction

IMPLEMENTED = (Backend.TRITON, Backend.REFERENCE)
OP = "linear_kl"


def linear_kl(
    hidden_p_NH: Tensor,
    weight_p_VH: Tensor,
    hidden_q_NK: Tensor,
    weight_q_VK: Tensor,
    labels_N: Tensor,
    *,
    direction: Direction | str,
    beta: float = 0.5,
    inverse_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare the trained head p with the fixed head q, and score labels under p in the same pass.

    With p = softmax(inverse_temperature * cap(hidden_p @ weight_p.T)), q likewise:

        forward: kl_n = KL(q || p) = sum_v q (ln q - ln p)
        reverse: kl_n = KL(p || q) = sum_v p (ln p - ln q)
        jsd:     kl_n = beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q
        logprob_n = ln p_n,label,   entropy_n = -sum_v p ln p

    hidden_p_NH: [N, H]; weight_p_VH: [V, H]; hidden_q_NK: [N, K]; weight_q_VK: [V, K]; labels_N: [N] integers
    in [0, V); beta: in (0, 1), for jsd only; inverse_temperature: number or [N]; cap(x) = softcap
    tanh(x / softcap), the identity for None. Returns kl_N, logprob_N, entropy_N: [N] float32 (float64 for
    float64 input), nats, differentiable in hidden_p and weight_p, once. q is fixed: a gradient asked of it is
    an error (to train q, exchange both heads and turn the direction around; for jsd beta becomes 1 - beta).
    Memory is bounded by a chunk of rows. Raises ShapeError and BackendError. Source of jsd: generalised
    Jensen-Shannon divergence, Agarwal et al. 2024, eq. 1, arXiv:2306.13649.
    """
    _check_heads(hidden_p_NH, weight_p_VH, hidden_q_NK, weight_q_VK)
    check_shape(OP, "labels_N", labels_N, (hidden_p_NH.shape[0],))
    check_labels(OP, labels_N, weight_p_VH.shape[0])
    if softcap is not None and not softcap > 0.0:
        raise ShapeError(f"{OP}: softcap must be positive or None, got {softcap}")
    if direction not in set(Direction):
        raise ShapeError(f"{OP}: direction must be one of {', '.join(Direction)}, got {str(direction)!r}")
    if not 0.0 < beta < 1.0:
        raise ShapeError(f"{OP}: beta must be in (0, 1), got {beta}")
    settings = reference.KlSettings(
        direction=Direction(direction),
        beta=beta,
        inverse_temperature=_temperature(inverse_temperature, hidden_p_NH),
        softcap=softcap,
    )
    double = torch.float64 in {hidden_p_NH.dtype, hidden_q_NK.dtype}
    # Triton sums in float32.
    implemented = (Backend.REFERENCE,) if double else IMPLEMENTED
    chosen = choose(OP, backend, implemented=implemented, device=hidden_p_NH.device.type)
    op = reference.linear_kl
    if chosen is Backend.TRITON:
        from slipstream_kernels.triton import linear_kl as kernels

        op = kernels.linear_kl
    return op(hidden_p_NH, weight_p_VH, hidden_q_NK, weight_q_VK, labels_N, settings=settings)


def _check_heads(hidden_p_NH: Tensor, weight_p_VH: Tensor, hidden_q_NK: Tensor, weight_q_VK: Tensor) -> None:
    for head, hidden, weight in (("p", hidden_p_NH, weight_p_VH), ("q", hidden_q_NK, weight_q_VK)):
        if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or not weight.numel():
            got = f"{list(hidden.shape)} and {list(weight.shape)}"
            raise ShapeError(
                f"{OP}: hidden_{head} and weight_{head} must be [N, hidden] and [V, hidden], sizes >= 1, "
                f"got {got}"
            )
    if hidden_p_NH.shape[0] != hidden_q_NK.shape[0] or weight_p_VH.shape[0] != weight_q_VK.shape[0]:
        p = f"{hidden_p_NH.shape[0]} rows, vocabulary {weight_p_VH.shape[0]}"
        q = f"{hidden_q_NK.shape[0]} rows, vocabulary {weight_q_VK.shape[0]}"
        raise ShapeError(f"{OP}: both heads must have the same rows and vocabulary, got p: {p}; q: {q}")
    for name, tensor in (("hidden_q_NK", hidden_q_NK), ("weight_q_VK", weight_q_VK)):
        if tensor.requires_grad:
            raise ShapeError(
                f"{OP}: {name} must not require a gradient, q is fixed; detach it, or exchange p and q and "
                "turn the direction around"
            )


def _temperature(inverse_temperature: float | Tensor, hidden_NH: Tensor) -> Tensor:
    dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
    if not isinstance(inverse_temperature, Tensor):
        if not 0.0 < inverse_temperature < float("inf"):
            raise ShapeError(f"{OP}: inverse_temperature must be positive, got {inverse_temperature}")
        return torch.full((1,), inverse_temperature, dtype=dtype, device=hidden_NH.device)
    if inverse_temperature.requires_grad:
        raise ShapeError(f"{OP}: inverse_temperature must not require a gradient; detach it")
    check_shape(OP, "inverse_temperature", inverse_temperature, (hidden_NH.shape[0],))
    return inverse_temperature.to(dtype)
