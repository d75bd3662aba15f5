"""Floor 1. The linear head in plain PyTorch: logits of a chunk of rows at a time.

Dimensions: N rows, H hidden, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 18
"""Logits held at once by linear_logprob: 1 MiB in float32, which stays in a core's cache."""
MIN_CHUNK_ROWS = 128
"""Least rows of a chunk, so that a large vocabulary's weight is not read again for every row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitSettings:
    """How hidden states become logits: z = inverse_temperature * cap(hidden @ weight.T + bias)."""

    inverse_temperature: Tensor
    """[1] or [N]."""
    softcap: float | None
    """cap(x) = softcap * tanh(x / softcap), or None for the identity."""


class _LinearLogprob(torch.autograd.Function):
    """Keeps log-sum-exp and entropy of each row; the backward pass makes the logits of a chunk again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        settings: LogitSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        weight = weight_VH.to(dtype)
        rows = hidden_NH.shape[0]
        logprob_N, entropy_N, logsumexp_N = (hidden_NH.new_empty(rows, dtype=dtype) for _ in range(3))
        for chunk in _chunks(rows, weight_VH.shape[0]):
            logits_CV, _ = _logits(hidden_NH[chunk].to(dtype), weight, bias_V, settings, chunk)
            label = logits_CV.gather(1, labels_N[chunk, None])[:, 0]
            peak = logits_CV.amax(1)
            # Relative to the peak: entropy as logsumexp - mean logit would cancel for confident rows.
            centred = logits_CV.sub_(peak[:, None])
            exponential = centred.exp()
            total = exponential.sum(1)
            logsumexp_N[chunk] = peak + total.log()
            logprob_N[chunk] = (label - peak) - total.log()
            entropy_N[chunk] = total.log() - exponential.mul_(centred).sum(1) / total
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, labels_N, entropy_N, logsumexp_N)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return logprob_N, entropy_N, logsumexp_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None
    ) -> Any:
        """With p = exp(z - lse): dz = g_logprob (1_label - p) - g_entropy p (ln p + entropy) + g_lse p."""
        hidden_NH, weight_VH, bias_V, labels_N, entropy_N, logsumexp_N = ctx.saved_tensors
        settings: LogitSettings = ctx.settings
        dtype = entropy_N.dtype
        weight = weight_VH.to(dtype)
        grad_hidden = torch.zeros_like(hidden_NH)
        grad_weight = torch.zeros_like(weight)
        grad_bias = torch.zeros_like(weight[:, 0])
        for chunk in _chunks(hidden_NH.shape[0], weight.shape[0]):
            hidden = hidden_NH[chunk].to(dtype)
            logits_CV, slope_CV = _logits(hidden, weight, bias_V, settings, chunk)
            log_p = logits_CV.sub_(logsumexp_N[chunk, None])
            grad_CV = log_p.exp()
            row = torch.zeros_like(entropy_N[chunk])
            row = row if grad_logprob is None else row - grad_logprob[chunk]
            row = row if grad_lse is None else row + grad_lse[chunk]
            if grad_entropy is None:
                grad_CV.mul_(row[:, None])
            else:
                inner = log_p.add_(entropy_N[chunk, None]).mul_(-grad_entropy[chunk, None])
                grad_CV.mul_(inner.add_(row[:, None]))
            if grad_logprob is not None:
                grad_CV.scatter_add_(1, labels_N[chunk, None], grad_logprob[chunk, None])
            temperature = settings.inverse_temperature
            grad_CV.mul_(temperature if temperature.numel() == 1 else temperature[chunk, None])
            grad_CV = grad_CV if slope_CV is None else grad_CV.mul_(slope_CV)
            grad_hidden[chunk] = (grad_CV @ weight).to(hidden_NH.dtype)
            grad_weight.addmm_(grad_CV.T, hidden)
            grad_bias += grad_CV.sum(0) if bias_V is not None else 0
        return (
            grad_hidden,
            grad_weight.to(weight_VH.dtype),
            None if bias_V is None else grad_bias.to(bias_V.dtype),
            None,
            None,
        )


def linear_logprob(
    hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, *, bias_V: Tensor | None, settings: LogitSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return [N] log-probability of each label, [N] entropy and [N] log-sum-exp of softmax(z), in nats."""
    result: tuple[Tensor, Tensor, Tensor] = _LinearLogprob.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, bias_V, labels_N.to(torch.int64), settings
    )
    return result


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _logits(
    hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, settings: LogitSettings, chunk: slice
) -> tuple[Tensor, Tensor | None]:
    """Return [C, V] logits and, under a softcap, [C, V] d cap(x) / dx = 1 - tanh(x / softcap)^2."""
    logits_CV = hidden_CH @ weight_VH.T
    if bias_V is not None:
        logits_CV.add_(bias_V)
    slope_CV = None
    if settings.softcap is not None:
        squashed = logits_CV.div_(settings.softcap).tanh_()
        slope_CV = 1.0 - squashed.square()
        logits_CV = squashed.mul_(settings.softcap)
    temperature = settings.inverse_temperature
    return logits_CV.mul_(temperature if temperature.numel() == 1 else temperature[chunk, None]), slope_CV
