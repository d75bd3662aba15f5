"""Floor 3. Divergence of two linear heads in Triton: its statistics, and the backward pass by chunks of rows.

Dimensions: N rows, C rows of a chunk, V vocabulary, H and K hidden sizes of p and q, J parts of the
vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream_kernels.dispatch import interpreted
from slipstream_kernels.reference import Direction, KlSettings
from slipstream_kernels.statistics import LN_2, PART_COLUMNS, finish
from slipstream_kernels.triton.kl_kernels import jsd_parts, kl_gradient, kl_parts, merge_kl_parts, sum_parts
from slipstream_kernels.triton.linear_logprob import GRADIENT_COLUMNS, MERGE_ROWS, head_statistics
from slipstream_kernels.triton.operands import Operands, paired_operands
from slipstream_kernels.tuning import Tile, Work

CHUNK_ELEMENTS = 1 << 28
"""Logits of one head that the backward pass holds at once: 1 GiB in float32."""
MIN_CHUNK_ROWS = 128


def kl_statistics(
    p: Operands, q: Operands, labels_C: Tensor, *, columns: int, settings: KlSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return [C] divergence, mean, log-probability and entropy of p, in nats.

    mean: what the gradient is centred by, KL(p || m) for Direction.JSD, else the divergence itself.
    """
    rows, reverse = labels_C.shape[0], settings.direction is Direction.REVERSE
    parts = triton.cdiv(columns, PART_COLUMNS)
    parts_J7C = torch.empty((parts, 7, rows), dtype=torch.float32, device=labels_C.device)
    temperature = settings.inverse_temperature.contiguous()
    tile = p.tile
    grid = (triton.cdiv(rows, tile.rows) * parts,)
    sizes = (rows, columns, p.width, q.width, 1.0 if settings.softcap is None else settings.softcap)
    launch: dict[str, Any] = {
        "PART": PART_COLUMNS,
        "C": tile.rows,
        "V": tile.columns,
        "H": tile.hidden,
        "GROUP": tile.group,
        "PER_ROW": temperature.numel() > 1,
        "SOFTCAP": settings.softcap is not None,
        "DESCRIPTORS": tile.descriptors,
        "PRECISION": "ieee",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }
    heads = (p.hidden, p.weight, q.hidden, q.weight)
    kl_parts[grid](*heads, labels_C, temperature, parts_J7C, *sizes, REVERSE=reverse, **launch)
    merged_7C = torch.empty_like(parts_J7C[0])
    blocks = (triton.cdiv(rows, MERGE_ROWS),)
    merge_kl_parts[blocks](
        parts_J7C, merged_7C, parts, rows, C=MERGE_ROWS, REVERSE=reverse, enable_fp_fusion=True
    )
    logprob_C, entropy_C, _ = finish(merged_7C[:4])
    spread_p_C, spread_q_C = merged_7C[1].log2(), merged_7C[5].log2()
    if settings.direction is Direction.JSD:
        logs = (merged_7C[0] + spread_p_C, merged_7C[4] + spread_q_C)
        parts_J2C = torch.empty((parts, 2, rows), dtype=torch.float32, device=labels_C.device)
        jsd_parts[grid](*heads, temperature, *logs, parts_J2C, *sizes, *_log_weights(settings), **launch)
        summed_2C = torch.empty_like(parts_J2C[0])
        blocks = (triton.cdiv(2 * rows, MERGE_ROWS),)
        sum_parts[blocks](parts_J2C, summed_2C, parts, 2 * rows, C=MERGE_ROWS, enable_fp_fusion=True)
        mean_C, other_C = (LN_2 * summed_2C).unbind()
        return settings.beta * mean_C + (1.0 - settings.beta) * other_C, mean_C, logprob_C, entropy_C
    if reverse:
        kl_C = LN_2 * (merged_7C[6] / merged_7C[1] - spread_p_C + spread_q_C)
    else:
        kl_C = LN_2 * (merged_7C[6] / merged_7C[5] - spread_q_C + spread_p_C)
    return kl_C, kl_C, logprob_C, entropy_C


class _LinearKl(torch.autograd.Function):
    """Keeps two numbers a row; the backward pass makes the logits of a chunk again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_p_NH: Tensor,
        weight_p_VH: Tensor,
        hidden_q_NK: Tensor,
        weight_q_VK: Tensor,
        labels_N: Tensor,
        settings: KlSettings,
        tile: Tile | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if labels_N.numel():
            work = Work.MIXTURE if settings.direction is Direction.JSD else Work.TWO_HEADS
            heads = (hidden_p_NH, weight_p_VH), (hidden_q_NK, weight_q_VK)
            p, q = paired_operands(*heads, work=work, tile=tile)
            kl_N, mean_N, logprob_N, entropy_N = kl_statistics(
                p, q, labels_N, columns=weight_p_VH.shape[0], settings=settings
            )
        else:
            empty = (torch.empty(0, device=labels_N.device) for _ in range(4))
            kl_N, mean_N, logprob_N, entropy_N = empty
        ctx.save_for_backward(hidden_p_NH, weight_p_VH, hidden_q_NK, weight_q_VK, labels_N, mean_N, entropy_N)
        ctx.settings = settings
        return kl_N, logprob_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_N: Tensor) -> Any:
        hidden_p_NH, weight_p_VH, hidden_q_NK, weight_q_VK, labels_N, mean_N, entropy_N = ctx.saved_tensors
        settings: KlSettings = ctx.settings
        (rows, _), vocabulary = hidden_p_NH.shape, weight_p_VH.shape[0]
        grad_hidden = torch.zeros_like(hidden_p_NH)
        grad_weight = torch.zeros_like(weight_p_VH, dtype=torch.float32)
        size = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary)
        for chunk in (slice(start, min(start + size, rows)) for start in range(0, rows, size)):
            hidden_p = hidden_p_NH[chunk]
            temperature = settings.inverse_temperature
            temperature = (temperature if temperature.numel() == 1 else temperature[chunk]).contiguous()
            logsumexps, logits = [], []
            for hidden, weight in ((hidden_p, weight_p_VH), (hidden_q_NK[chunk], weight_q_VK)):
                logits_CV = torch.empty(
                    (hidden.shape[0], vocabulary), dtype=torch.float32, device=hidden.device
                )
                statistics_4C = head_statistics(
                    hidden, weight, labels_N[chunk], inverse_temperature=temperature, bias_V=None,
                    softcap=settings.softcap, logits_CV=logits_CV,
                )  # fmt: skip
                logsumexps.append(finish(statistics_4C)[2])
                logits.append(logits_CV)
            # In the interpreter numbers are float32; on a device the products below take the inputs' type.
            grad_CV = logits[0] if interpreted() else torch.empty_like(logits[0], dtype=hidden_p.dtype)
            rows_C = [tensor[chunk].contiguous() for tensor in (mean_N, entropy_N, *grads_N)]
            kl_gradient[(hidden_p.shape[0],)](
                *logits, grad_CV, labels_N[chunk], *logsumexps, *rows_C, temperature, vocabulary,
                1.0 if settings.softcap is None else settings.softcap, settings.beta, *_log_weights(settings),
                V=min(GRADIENT_COLUMNS, triton.next_power_of_2(vocabulary)),
                FORWARD=settings.direction is Direction.FORWARD,
                REVERSE=settings.direction is Direction.REVERSE,
                PER_ROW=temperature.numel() > 1,
                SOFTCAP=settings.softcap is not None,
                num_warps=8,
                enable_fp_fusion=True,
            )  # fmt: skip
            grad_hidden[chunk] = (grad_CV @ weight_p_VH.to(grad_CV.dtype)).to(grad_hidden.dtype)
            _accumulate(grad_weight, grad_CV, hidden_p.to(grad_CV.dtype))
        return grad_hidden, grad_weight.to(weight_p_VH.dtype), None, None, None, None, None


def linear_kl(
    hidden_p_NH: Tensor,
    weight_p_VH: Tensor,
    hidden_q_NK: Tensor,
    weight_q_VK: Tensor,
    labels_N: Tensor,
    *,
    settings: KlSettings,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return [N] divergence, and [N] log-probability of each label and [N] entropy under p; see reference."""
    result: tuple[Tensor, Tensor, Tensor] = _LinearKl.apply(  # type: ignore[no-untyped-call]
        hidden_p_NH,
        weight_p_VH,
        hidden_q_NK,
        weight_q_VK,
        labels_N.to(torch.int64).contiguous(),
        settings,
        tile,
    )
    return result


def _log_weights(settings: KlSettings) -> tuple[float, float]:
    """Return log2 of the weights of p and of q in the mixture."""
    return math.log2(settings.beta), math.log2(1.0 - settings.beta)


def _accumulate(grad_weight_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    """Add grad.T @ hidden in float32, whatever the type of the factors."""
    if grad_CV.dtype is torch.float32:
        grad_weight_VH.addmm_(grad_CV.T, hidden_CH)
    else:
        torch.addmm(grad_weight_VH, grad_CV.T, hidden_CH, out_dtype=torch.float32, out=grad_weight_VH)
