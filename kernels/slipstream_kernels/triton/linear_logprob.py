# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Floor 3. The linear head in Triton: statistics of rows of logits, and the gradient of logits in place.

One program computes the logits of a block of rows and one part of the vocabulary (statistics.PART_COLUMNS)
and keeps four numbers a row; a second kernel merges the parts in index order. No number of a row depends on
other rows or other parts, so the bits are the same for every batch, chunk or shard of whole parts.

Dimensions: C rows, V vocabulary, H hidden, K parts of the vocabulary, 4 statistics (see statistics.py); in
kernels, C, V and H are the sizes of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream_kernels.dispatch import interpreted
from slipstream_kernels.statistics import LEAST_PEAK, LOG2_E, PART_COLUMNS
from slipstream_kernels.triton.operands import operands, writable
from slipstream_kernels.tuning import Tile

MERGE_ROWS = 128
GRADIENT_COLUMNS = 4096
"""Columns held at once by a program of the gradient: a wider block would leave the multiprocessor idle."""
_LOG2_E = tl.constexpr(LOG2_E)
_LEAST_PEAK = tl.constexpr(LEAST_PEAK)


@triton.jit
def product(
    hidden, weight, row, column, rows, columns, width,
    C: tl.constexpr, V: tl.constexpr, H: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the [C, V] block of hidden @ weight.T at (row, column), summed in float32."""
    total_CV = tl.zeros((C, V), dtype=tl.float32)
    at_C = row + tl.arange(0, C)[:, None]
    at_V = column + tl.arange(0, V)[:, None]
    for start in tl.range(0, width, H):
        if DESCRIPTORS:
            hidden_CH = hidden.load([row, start])
            weight_VH = weight.load([column, start])
        else:
            at_H = start + tl.arange(0, H)[None, :]
            hidden_CH = tl.load(
                hidden + at_C.to(tl.int64) * width + at_H, mask=(at_C < rows) & (at_H < width), other=0.0
            )
            weight_VH = tl.load(
                weight + at_V.to(tl.int64) * width + at_H, mask=(at_V < columns) & (at_H < width), other=0.0
            )
        total_CV = tl.dot(hidden_CH, weight_VH.T, total_CV, input_precision=PRECISION)
    return total_CV


@triton.jit
def capped(logits_CV, softcap):
    """Return softcap * tanh(logits / softcap); written out, since the interpreter has no tanh."""
    decay_CV = tl.exp2(tl.abs(logits_CV) * (-2.0 * _LOG2_E / softcap))
    size_CV = softcap * ((1.0 - decay_CV) / (1.0 + decay_CV))
    return tl.where(logits_CV < 0.0, -size_CV, size_CV)


@triton.jit
def row_scale(inverse_temperature, at_C, rows, PER_ROW: tl.constexpr):
    """Return [C] inverse temperatures."""
    if PER_ROW:
        return tl.load(inverse_temperature + at_C, mask=at_C < rows, other=1.0)
    return tl.load(inverse_temperature) + tl.zeros_like(at_C).to(tl.float32)


@triton.jit
def local_labels(labels_C, at_C, rows, columns):
    """Return [C] int32 labels, -1 where a label lies outside [0, columns)."""
    label_C = tl.load(labels_C + at_C, mask=at_C < rows, other=-1)
    return tl.where((label_C >= 0) & (label_C < columns), label_C, -1).to(tl.int32)


@triton.jit
def _head_parts(
    hidden, weight, labels_C, inverse_temperature, bias_V, parts_K4C, logits_CV,
    rows, columns, width, softcap,
    PART: tl.constexpr, C: tl.constexpr, V: tl.constexpr, H: tl.constexpr,
    PER_ROW: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, LOGITS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Statistics of C rows and one part of the vocabulary, over blocks of V columns from left to right."""
    row, part = tl.program_id(0) * C, tl.program_id(1)
    at_C = row + tl.arange(0, C)
    label_C = local_labels(labels_C, at_C, rows, columns)
    temperature_C = row_scale(inverse_temperature, at_C, rows, PER_ROW)
    # Base 2 is entered here, once: everything below is in units of ln 2.
    scale_C = temperature_C * _LOG2_E
    peak_C = tl.full((C,), _LEAST_PEAK, dtype=tl.float32)
    total_C = tl.zeros((C,), dtype=tl.float32)
    weighted_C = tl.zeros((C,), dtype=tl.float32)
    picked_C = tl.zeros((C,), dtype=tl.float32)
    last = min(part * PART + PART, columns)
    for column in tl.range(part * PART, last, V, warp_specialize=WARP_SPECIALIZE):
        z_CV = product(hidden, weight, row, column, rows, columns, width, C, V, H, DESCRIPTORS, PRECISION)
        at_V = column + tl.arange(0, V)
        if BIAS:
            z_CV += tl.load(bias_V + at_V, mask=at_V < columns, other=0.0).to(tl.float32)[None, :]
        if SOFTCAP:
            z_CV = capped(z_CV, softcap)
        if LOGITS:
            natural_CV = z_CV * temperature_C[:, None]
            if DESCRIPTORS:
                logits_CV.store([row, column], natural_CV.to(logits_CV.dtype))
            else:
                # Offsets from the block's corner fit into 32 bits; 64-bit ones would fill the registers.
                corner = logits_CV + row.to(tl.int64) * columns + column
                offset_CV = tl.arange(0, C)[:, None] * columns + tl.arange(0, V)[None, :]
                inside_CV = (at_C[:, None] < rows) & (at_V[None, :] < columns)
                tl.store(corner + offset_CV, natural_CV.to(logits_CV.dtype.element_ty), mask=inside_CV)
        # Columns past the vocabulary are hidden before the maximum: their product, 0, may be the largest.
        z_CV = tl.where(at_V[None, :] < columns, z_CV * scale_C[:, None], _LEAST_PEAK)
        picked_C += tl.sum(tl.where(at_V[None, :] == label_C[:, None], z_CV, 0.0), 1)
        new_peak_C = tl.maximum(peak_C, tl.max(z_CV, 1))
        shift_C = peak_C - new_peak_C
        shrink_C = tl.exp2(shift_C)
        z_CV -= new_peak_C[:, None]
        power_CV = tl.exp2(z_CV)
        weighted_C = shrink_C * (weighted_C + shift_C * total_C) + tl.sum(power_CV * z_CV, 1)
        total_C = shrink_C * total_C + tl.sum(power_CV, 1)
        peak_C = new_peak_C
    out = parts_K4C + part.to(tl.int64) * 4 * rows + at_C
    tl.store(out, peak_C, mask=at_C < rows)
    tl.store(out + rows, total_C, mask=at_C < rows)
    tl.store(out + 2 * rows, weighted_C, mask=at_C < rows)
    tl.store(out + 3 * rows, picked_C, mask=at_C < rows)


@triton.jit
def _merge_parts(parts_K4C, merged_4C, parts, rows, C: tl.constexpr):
    """Merge the parts of C rows in index order; see statistics.merge."""
    at_C = tl.program_id(0) * C + tl.arange(0, C)
    inside_C = at_C < rows
    peak_C = tl.full((C,), _LEAST_PEAK, dtype=tl.float32)
    total_C = tl.zeros((C,), dtype=tl.float32)
    weighted_C = tl.zeros((C,), dtype=tl.float32)
    picked_C = tl.zeros((C,), dtype=tl.float32)
    for part in range(parts):
        here = parts_K4C + tl.cast(part, tl.int64) * 4 * rows + at_C
        other_peak_C = tl.load(here, mask=inside_C, other=0.0)
        other_total_C = tl.load(here + rows, mask=inside_C, other=0.0)
        other_weighted_C = tl.load(here + 2 * rows, mask=inside_C, other=0.0)
        new_peak_C = tl.maximum(peak_C, other_peak_C)
        left_C, right_C = peak_C - new_peak_C, other_peak_C - new_peak_C
        weighted_C = tl.exp2(left_C) * (weighted_C + left_C * total_C) + tl.exp2(right_C) * (
            other_weighted_C + right_C * other_total_C
        )
        total_C = tl.exp2(left_C) * total_C + tl.exp2(right_C) * other_total_C
        picked_C += tl.load(here + 3 * rows, mask=inside_C, other=0.0)
        peak_C = new_peak_C
    tl.store(merged_4C + at_C, peak_C, mask=inside_C)
    tl.store(merged_4C + rows + at_C, total_C, mask=inside_C)
    tl.store(merged_4C + 2 * rows + at_C, weighted_C, mask=inside_C)
    tl.store(merged_4C + 3 * rows + at_C, picked_C, mask=inside_C)


@triton.jit
def _logit_gradient(
    logits_CV, labels_C, logsumexp_C, entropy_C, grad_logprob_C, grad_entropy_C, grad_logsumexp_C,
    inverse_temperature, columns, softcap,
    V: tl.constexpr, PER_ROW: tl.constexpr, SOFTCAP: tl.constexpr,
    LOGPROB: tl.constexpr, ENTROPY: tl.constexpr, LOGSUMEXP: tl.constexpr,
):  # fmt: skip
    """Replace one row of logits by its gradient, V columns at a time."""
    row = tl.program_id(0)
    zero = tl.load(logsumexp_C + row) * 0.0
    g_logprob, g_entropy, g_logsumexp, entropy = zero, zero, zero, zero
    if LOGPROB:
        g_logprob = tl.load(grad_logprob_C + row)
    if ENTROPY:
        g_entropy = tl.load(grad_entropy_C + row)
        entropy = tl.load(entropy_C + row)
    if LOGSUMEXP:
        g_logsumexp = tl.load(grad_logsumexp_C + row)
    label = tl.load(labels_C + row)
    logsumexp = tl.load(logsumexp_C + row)
    temperature = tl.load(inverse_temperature + row) if PER_ROW else tl.load(inverse_temperature)
    active = (g_logprob != 0.0) | (g_entropy != 0.0) | (g_logsumexp != 0.0)
    here = logits_CV + row.to(tl.int64) * columns
    for start in range(0, columns, V):
        at_V = start + tl.arange(0, V)
        z_V = tl.load(here + at_V, mask=at_V < columns, other=0.0).to(tl.float32)
        log_p_V = z_V - logsumexp
        dz_V = tl.exp2(log_p_V * _LOG2_E) * (
            g_logsumexp - g_logprob - g_entropy * (log_p_V + entropy)
        ) + tl.where(at_V == label, g_logprob, 0.0)
        if SOFTCAP:
            squashed_V = z_V / (temperature * softcap)
            dz_V *= 1.0 - squashed_V * squashed_V
        # Selected, not multiplied: a row without a gradient stays 0 whatever its logits hold.
        dz_V = tl.where(active, dz_V * temperature, 0.0)
        tl.store(here + at_V, dz_V.to(logits_CV.dtype.element_ty), mask=at_V < columns)


def head_parts(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    labels_C: Tensor,
    *,
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
        given = operands(hidden_CH, weight_VH, output_CV, tile=tile)
        chosen = given.tile
        _head_parts[(triton.cdiv(rows, chosen.rows), parts_K4C.shape[0])](
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
            PER_ROW=inverse_temperature.numel() > 1,
            BIAS=bias_V is not None,
            SOFTCAP=softcap is not None,
            LOGITS=logits_CV is not None,
            DESCRIPTORS=chosen.descriptors,
            WARP_SPECIALIZE=chosen.warp_specialize,
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
        _merge_parts[(triton.cdiv(rows, MERGE_ROWS),)](
            parts_K4C, merged_4C, parts, rows, C=MERGE_ROWS, enable_fp_fusion=True
        )
    return merged_4C


def head_statistics(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    labels_C: Tensor,
    *,
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
        _logit_gradient[(rows,)](
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
