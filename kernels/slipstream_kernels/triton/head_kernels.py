# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Floor 3. The kernels of a linear head: statistics of rows of logits, and the gradient of logits in place.

One program computes the logits of a block of rows and one part of the vocabulary (statistics.PART_COLUMNS)
and keeps four numbers a row; a second kernel merges the parts in index order. No number of a row depends on
other rows or other parts, so the bits are the same for every batch, chunk or shard of whole parts.

Dimensions: C rows, V vocabulary, H hidden, K parts of the vocabulary, 4 statistics (see statistics.py); in
kernels, C, V and H are the sizes of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from slipstream_kernels.statistics import LEAST_PEAK, LOG2_E

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
def placed(program, row_blocks, parts, GROUP: tl.constexpr):
    """Return row block and part of a program: GROUP row blocks share their parts, before the next GROUP.

    Programs that run at the same time then read few rows and few columns, which stay in the L2 cache.
    """
    group = program // (GROUP * parts)
    blocks = min(row_blocks - group * GROUP, GROUP)
    within = program - group * GROUP * parts
    return group * GROUP + within % blocks, within // blocks


@triton.jit
def block_statistics(
    z_CV, row, column, label_C, temperature_C, bias_V, logits_CV, rows, columns, softcap,
    peak_C, total_C, weighted_C, picked_C,
    C: tl.constexpr, V: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, LOGITS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Return the four [C] statistics with a [C, V] block of products added, which is written where wanted."""
    at_V = column + tl.arange(0, V)
    if BIAS:
        z_CV += tl.load(bias_V + at_V, mask=at_V < columns, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        z_CV = capped(z_CV, softcap)
    z_CV *= temperature_C[:, None]
    if LOGITS:
        if DESCRIPTORS:
            logits_CV.store([row, column], z_CV.to(logits_CV.dtype))
        else:
            # Offsets from the block's corner fit into 32 bits; 64-bit ones would fill the registers.
            corner = logits_CV + row.to(tl.int64) * columns + column
            offset_CV = tl.arange(0, C)[:, None] * columns + tl.arange(0, V)[None, :]
            inside_CV = (row + tl.arange(0, C)[:, None] < rows) & (at_V[None, :] < columns)
            tl.store(corner + offset_CV, z_CV.to(logits_CV.dtype.element_ty), mask=inside_CV)
    # Base 2 is entered here, once: statistics are in units of ln 2. Columns past the vocabulary are hidden
    # before the maximum: their product, 0, may be the largest.
    z_CV = tl.where(at_V[None, :] < columns, z_CV * _LOG2_E, _LEAST_PEAK)
    picked_C += tl.sum(tl.where(at_V[None, :] == label_C[:, None], z_CV, 0.0), 1)
    new_peak_C = tl.maximum(peak_C, tl.max(z_CV, 1))
    shift_C = peak_C - new_peak_C
    shrink_C = tl.exp2(shift_C)
    z_CV -= new_peak_C[:, None]
    power_CV = tl.exp2(z_CV)
    weighted_C = shrink_C * (weighted_C + shift_C * total_C) + tl.sum(power_CV * z_CV, 1)
    total_C = shrink_C * total_C + tl.sum(power_CV, 1)
    return new_peak_C, total_C, weighted_C, picked_C


@triton.jit
def sweep_parts(
    hidden, weight, labels_C, inverse_temperature, bias_V, parts_K4C, logits_CV,
    rows, columns, width, softcap,
    PART: tl.constexpr, C: tl.constexpr, V: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr,
    PER_ROW: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, LOGITS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write [4, C] statistics of C rows and one part of the vocabulary, by V columns from left to right.

    parts_K4C: [K, 4, rows], see statistics.py, in units of ln 2; logits_CV: [rows, columns], where wanted.
    """
    row_block, part = placed(tl.program_id(0), tl.cdiv(rows, C), tl.cdiv(columns, PART), GROUP)
    row = row_block * C
    at_C = row + tl.arange(0, C)
    label_C = local_labels(labels_C, at_C, rows, columns)
    temperature_C = row_scale(inverse_temperature, at_C, rows, PER_ROW)
    peak_C = tl.full((C,), _LEAST_PEAK, dtype=tl.float32)
    total_C = tl.zeros((C,), dtype=tl.float32)
    weighted_C = tl.zeros((C,), dtype=tl.float32)
    picked_C = tl.zeros((C,), dtype=tl.float32)
    last = min(part * PART + PART, columns)
    for column in tl.range(part * PART, last, V):
        z_CV = product(hidden, weight, row, column, rows, columns, width, C, V, H, DESCRIPTORS, PRECISION)
        if HALVES:
            left_CW, right_CW = tl.split(tl.permute(tl.reshape(z_CV, (C, 2, V // 2)), (0, 2, 1)))
            peak_C, total_C, weighted_C, picked_C = block_statistics(
                left_CW, row, column, label_C, temperature_C, bias_V, logits_CV, rows, columns, softcap,
                peak_C, total_C, weighted_C, picked_C, C, V // 2, BIAS, SOFTCAP, LOGITS, DESCRIPTORS,
            )  # fmt: skip
            peak_C, total_C, weighted_C, picked_C = block_statistics(
                right_CW, row, column + V // 2, label_C, temperature_C, bias_V, logits_CV, rows, columns,
                softcap, peak_C, total_C, weighted_C, picked_C, C, V // 2, BIAS, SOFTCAP, LOGITS, DESCRIPTORS,
            )  # fmt: skip
        else:
            peak_C, total_C, weighted_C, picked_C = block_statistics(
                z_CV, row, column, label_C, temperature_C, bias_V, logits_CV, rows, columns, softcap,
                peak_C, total_C, weighted_C, picked_C, C, V, BIAS, SOFTCAP, LOGITS, DESCRIPTORS,
            )  # fmt: skip
    out = parts_K4C + part.to(tl.int64) * 4 * rows + at_C
    tl.store(out, peak_C, mask=at_C < rows)
    tl.store(out + rows, total_C, mask=at_C < rows)
    tl.store(out + 2 * rows, weighted_C, mask=at_C < rows)
    tl.store(out + 3 * rows, picked_C, mask=at_C < rows)


@triton.jit
def fold_parts(parts_K4C, merged_4C, parts, rows, C: tl.constexpr):
    """Merge the [K, 4, rows] parts of C rows in index order into [4, rows]; see statistics.merge."""
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
def replace_by_gradient(
    logits_CV, labels_C, logsumexp_C, entropy_C, grad_logprob_C, grad_entropy_C, grad_logsumexp_C,
    inverse_temperature, columns, softcap,
    V: tl.constexpr, PER_ROW: tl.constexpr, SOFTCAP: tl.constexpr,
    LOGPROB: tl.constexpr, ENTROPY: tl.constexpr, LOGSUMEXP: tl.constexpr,
):  # fmt: skip
    """Replace one row of [rows, columns] logits by its gradient to hidden @ weight.T, V columns at a time.

    logits_CV: times the inverse temperature, in nats, as logsumexp_C and entropy_C are; [rows] each.
    """
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
