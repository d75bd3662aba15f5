"""Floor 1. Divergence of two linear heads in plain PyTorch: logits of a chunk of rows at a time.

Dimensions: N rows, H and K hidden sizes of p and q, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KL_CHUNK_ELEMENTS = 1 << 18
"""Logits of one head held at once by linear_kl: 1 MiB in float32."""
KL_MIN_CHUNK_ROWS = 64
"""Least rows of a chunk, so that a large vocabulary's weights are not read again for every row."""


class Direction(StrEnum):
    """Which divergence of the trained p and the fixed q."""

    FORWARD = "forward"
    """KL(q || p): p is drawn to cover what q does."""
    REVERSE = "reverse"
    """KL(p || q): p is drawn to where q is high."""
    JSD = "jsd"
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KlSettings:
    """What is compared, and how hidden states become logits; both heads alike."""

    direction: Direction
    beta: float
    """Weight of p in the mixture, in (0, 1); read by Direction.JSD only."""
    inverse_temperature: Tensor
    """[1] or [N]."""
    softcap: float | None
    """cap(x) = softcap * tanh(x / softcap), or None for the identity."""


def divergence(log_p_CV: Tensor, log_q_CV: Tensor, settings: KlSettings) -> tuple[Tensor, Tensor]:
    """Return the [C] divergence and the [C, V] slope s such that d divergence / d z_p = s - p sum(s)."""
    p, q = log_p_CV.exp(), log_q_CV.exp()
    if settings.direction is Direction.FORWARD:
        # Its slope -q sums to -1: the gradient is p - q.
        return (q * (log_q_CV - log_p_CV)).sum(1), -q
    if settings.direction is Direction.REVERSE:
        slope_CV = p * (log_p_CV - log_q_CV)
        return slope_CV.sum(1), slope_CV
    beta = log_p_CV.new_tensor(settings.beta)
    log_m_CV = torch.logaddexp(log_p_CV + beta.log(), log_q_CV + (1.0 - beta).log())
    slope_CV = beta * p * (log_p_CV - log_m_CV)
    return slope_CV.sum(1) + (1.0 - beta) * (q * (log_q_CV - log_m_CV)).sum(1), slope_CV


class _LinearKl(torch.autograd.Function):
    """Keeps its inputs only; the backward pass makes the logits of a chunk again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_p_NH: Tensor,
        weight_p_VH: Tensor,
        hidden_q_NK: Tensor,
        weight_q_VK: Tensor,
        labels_N: Tensor,
        settings: KlSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(hidden_p_NH.dtype, torch.float32)
        rows = hidden_p_NH.shape[0]
        kl_N, logprob_N, entropy_N = (hidden_p_NH.new_empty(rows, dtype=dtype) for _ in range(3))
        weight_p, weight_q = weight_p_VH.to(dtype), weight_q_VK.to(dtype)
        for chunk in _chunks(rows, weight_p.shape[0]):
            log_p, _ = _log_softmax(hidden_p_NH[chunk].to(dtype), weight_p, settings, chunk)
            log_q, _ = _log_softmax(hidden_q_NK[chunk].to(dtype), weight_q, settings, chunk)
            kl_N[chunk], _ = divergence(log_p, log_q, settings)
            logprob_N[chunk] = log_p.gather(1, labels_N[chunk, None])[:, 0]
            entropy_N[chunk] = -(log_p.exp() * log_p).sum(1)
        ctx.save_for_backward(hidden_p_NH, weight_p_VH, hidden_q_NK, weight_q_VK, labels_N, entropy_N)
        ctx.settings = settings
        return kl_N, logprob_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl_N: Tensor, grad_logprob_N: Tensor, grad_entropy_N: Tensor) -> Any:
        """With s of `divergence`: g_kl (s - p sum(s)) + g_logprob (1_label - p) - g_entropy p (ln p + H)."""
        hidden_p_NH, weight_p_VH, hidden_q_NK, weight_q_VK, labels_N, entropy_N = ctx.saved_tensors
        settings: KlSettings = ctx.settings
        dtype = entropy_N.dtype
        weight_p, weight_q = weight_p_VH.to(dtype), weight_q_VK.to(dtype)
        grad_hidden, grad_weight = torch.zeros_like(hidden_p_NH), torch.zeros_like(weight_p)
        for chunk in _chunks(hidden_p_NH.shape[0], weight_p.shape[0]):
            hidden_p = hidden_p_NH[chunk].to(dtype)
            log_p, factor = _log_softmax(hidden_p, weight_p, settings, chunk)
            log_q, _ = _log_softmax(hidden_q_NK[chunk].to(dtype), weight_q, settings, chunk)
            _, slope_CV = divergence(log_p, log_q, settings)
            g_kl, g_logprob, g_entropy = (
                grad[chunk, None] for grad in (grad_kl_N, grad_logprob_N, grad_entropy_N)
            )
            inner = -g_kl * slope_CV.sum(1, keepdim=True) - g_logprob
            inner = inner - g_entropy * (log_p + entropy_N[chunk, None])
            grad_CV = g_kl * slope_CV + log_p.exp() * inner
            grad_CV.scatter_add_(1, labels_N[chunk, None], g_logprob)
            grad_CV = grad_CV * factor
            grad_hidden[chunk] = (grad_CV @ weight_p).to(hidden_p_NH.dtype)
            grad_weight.addmm_(grad_CV.T, hidden_p)
        return grad_hidden, grad_weight.to(weight_p_VH.dtype), None, None, None, None


def linear_kl(
    hidden_p_NH: Tensor,
    weight_p_VH: Tensor,
    hidden_q_NK: Tensor,
    weight_q_VK: Tensor,
    labels_N: Tensor,
    *,
    settings: KlSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return [N] divergence, and [N] log-probability of each label and [N] entropy under p, in nats."""
    result: tuple[Tensor, Tensor, Tensor] = _LinearKl.apply(  # type: ignore[no-untyped-call]
        hidden_p_NH, weight_p_VH, hidden_q_NK, weight_q_VK, labels_N.to(torch.int64), settings
    )
    return result


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(KL_MIN_CHUNK_ROWS, KL_CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _log_softmax(
    hidden_CH: Tensor, weight_VH: Tensor, settings: KlSettings, chunk: slice
) -> tuple[Tensor, Tensor]:
    """Return [C, V] ln softmax(z) and d z / d (hidden @ weight.T), which broadcasts to [C, V]."""
    temperature = settings.inverse_temperature
    temperature = (temperature if temperature.numel() == 1 else temperature[chunk])[:, None]
    x_CV = hidden_CH @ weight_VH.T
    if settings.softcap is None:
        return (x_CV * temperature).log_softmax(1), temperature
    squashed = torch.tanh(x_CV / settings.softcap)
    logits_CV = settings.softcap * squashed * temperature
    return logits_CV.log_softmax(1), (1.0 - squashed.square()) * temperature
