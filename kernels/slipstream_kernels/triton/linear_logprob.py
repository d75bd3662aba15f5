"""Floor 3. The linear head in Triton: statistics of rows of logits, and the gradient of logits in place.

Dimensions: C rows, V vocabulary, H hidden, K parts of the vocabulary, 4 statistics (see statistics.py).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from slipstream_kernels.dispatch import interpreted
from slipstream_kernels.statistics import PART_COLUMNS, finish
from slipstream_kernels.triton.head_kernels import fold_parts, replace_by_gradient, sweep_parts
from slipstream_kernels.triton.operands import operands, writable
from slipstream_kernels.tuning import Tile

MERGE_ROWS = 128
GRADIENT_COLUMNS = 4096
"""Columns held at once by a program of the gradient: a wider block would leave the multiprocessor idle."""


def head_parts(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    labels_C: Tensor,
    inverse_temperature: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    logits_CV: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Return [K, 4, C] float32: statistics of each part of the vocabulary; arguments: see head_statistics.

    A vocabulary that is sharded at multiples of PART_COLUMNS gives, gathered and merged, the bits of the
    whole.
    """
    (rows, width), columns = hidden_CH.shape, weight_VH.shape[0]
    parts_K4C = torch.empty(
        (triton.cdiv(columns, PART_COLUMNS), 4, rows), dtype=torch.float32, device=hidden_CH.device
    )
    if rows == 0:
        return parts_K4C
    with writable(logits_CV) as output_CV:
        plain = bias_V is None and softcap is None
        given = operands(hidden_CH, weight_VH, output_CV, tile=tile, plain=plain)
        chosen = given.tile
        sweep_parts[(triton.cdiv(rows, chosen.rows) * parts_K4C.shape[0],)](
            given.hidden,
            given.weight,
            labels_C.contiguous(),
            inverse_temperature.contiguous(),
            parts_K4C if bias_V is None else bias_V.contiguous(),
            parts_K4C,
            parts_K4C if given.output is None else given.output,
            rows,
            columns,
            width,
            1.0 if softcap is None else softcap,
            PART=PART_COLUMNS,
            C=chosen.rows,
            V=chosen.columns,
            H=chosen.hidden,
            GROUP=chosen.group,
            PER_ROW=inverse_temperature.numel() > 1,
            BIAS=bias_V is not None,
            SOFTCAP=softcap is not None,
            LOGITS=logits_CV is not None,
            DESCRIPTORS=chosen.descriptors,
            HALVES=chosen.halves,
            PRECISION="ieee",
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            enable_fp_fusion=True,
        )
    return parts_K4C


def merge_parts(parts_K4C: Tensor) -> Tensor:
    """Return [4, C] statistics of a vocabulary from those of its parts, merged in index order."""
    parts, _, rows = parts_K4C.shape
    merged_4C = torch.empty_like(parts_K4C[0])
    if rows:
        fold_parts[(triton.cdiv(rows, MERGE_ROWS),)](
            parts_K4C, merged_4C, parts, rows, C=MERGE_ROWS, enable_fp_fusion=True
        )
    return merged_4C


def head_statistics(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    labels_C: Tensor,
    inverse_temperature: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    logits_CV: Tensor | None = None,
) -> Tensor:
    """Return [4, C] float32 statistics of z = inverse_temperature * cap(hidden @ weight.T + bias).

    hidden_CH: [C, H]; weight_VH: [V, H]; labels_C: [C] int64, relative to the weight's first row: one outside
    [0, V) has the label statistic 0; inverse_temperature: [1] or [C] float32; bias_V: [V]; softcap: cap(x) =
    softcap tanh(x / softcap), None for the identity. logits_CV: [C, V] float32 or bfloat16, contiguous; the
    same launch writes z into it, in natural units. Statistics come from float32 sums, never from rounded
    logits.
    """
    return merge_parts(
        head_parts(
            hidden_CH,
            weight_VH,
            labels_C,
            inverse_temperature=inverse_temperature,
            bias_V=bias_V,
            softcap=softcap,
            logits_CV=logits_CV,
        )
    )


def head_scores(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    labels_C: Tensor,
    inverse_temperature: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    logits_CV: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return [C] float32 log-probability, entropy and log-sum-exp, nats; arguments: see head_statistics."""
    return finish(
        head_statistics(
            hidden_CH, weight_VH, labels_C, inverse_temperature, bias_V, softcap, logits_CV=logits_CV
        )
    )


def logit_gradient_(
    logits_CV: Tensor,
    labels_C: Tensor,
    *,
    logsumexp_C: Tensor,
    entropy_C: Tensor,
    grad_logprob_C: Tensor | None,
    grad_entropy_C: Tensor | None,
    grad_logsumexp_C: Tensor | None,
    inverse_temperature: Tensor,
    softcap: float | None,
) -> None:
    """Turn logits z, as head_statistics writes them, into d loss / d (hidden @ weight.T + bias), in place.

        p = exp(z - logsumexp)
        dz = g_logprob (1_label - p) - g_entropy p (ln p + entropy) + g_logsumexp p
        result = inverse_temperature (1 - (z / (inverse_temperature softcap))^2) dz

    logits_CV: [C, V] float32 or bfloat16, contiguous; the rest [C], float32, nats; a gradient that is None is
    0. labels_C: int64, one outside [0, V) is in another shard. Rows whose gradients are all 0 become exactly
    0.
    """
    rows, columns = logits_CV.shape
    if rows == 0:
        return

    def given(gradient_C: Tensor | None) -> Tensor:
        return logsumexp_C if gradient_C is None else gradient_C.contiguous()

    with writable(logits_CV) as output_CV:
        replace_by_gradient[(rows,)](
            output_CV,
            labels_C.contiguous(),
            logsumexp_C.contiguous(),
            entropy_C.contiguous(),
            given(grad_logprob_C),
            given(grad_entropy_C),
            given(grad_logsumexp_C),
            inverse_temperature.contiguous(),
            columns,
            1.0 if softcap is None else softcap,
            V=min(GRADIENT_COLUMNS, triton.next_power_of_2(columns)) if interpreted() else GRADIENT_COLUMNS,
            PER_ROW=inverse_temperature.numel() > 1,
            SOFTCAP=softcap is not None,
            LOGPROB=grad_logprob_C is not None,
            ENTROPY=grad_entropy_C is not None,
            LOGSUMEXP=grad_logsumexp_C is not None,
            num_warps=8,
            enable_fp_fusion=True,
        )
