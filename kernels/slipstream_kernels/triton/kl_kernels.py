# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Floor 3. The kernels of linear_kl: statistics of two heads at once, and the gradient of logits.

Like the linear head (head_kernels.py), by parts of the vocabulary that are merged in index order. Of p and
q each part keeps peak and total of statistics.py, of p also `weighted` and `label`, and of the divergence

    cross = sum 2^(a - peak_a) ((a - peak_a) - (b - peak_b)),   a = p, b = q for KL(p || q), else exchanged

so that KL = ln 2 (cross / total_a - log2 total_a + log2 total_b). The Jensen-Shannon divergence is not linear
in unfinished parts: it is summed in a second pass, which knows the log-sum-exp of both.

Dimensions: C rows, V vocabulary, H hidden, J parts of the vocabulary; in kernels, C, V and H are the sizes of
a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from slipstream_kernels.statistics import LEAST_PEAK, LOG2_E
from slipstream_kernels.triton.head_kernels import capped, local_labels, placed, product, row_scale

_LOG2_E = tl.constexpr(LOG2_E)
_LEAST_PEAK = tl.constexpr(LEAST_PEAK)


@triton.jit
def scaled_logits(
    hidden, weight, row, column, rows, columns, width, softcap, scale_C,
    C: tl.constexpr, V: tl.constexpr, H: tl.constexpr,
    SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return [C, V] logits in units of ln 2, the least peak in columns past the vocabulary."""
    z_CV = product(hidden, weight, row, column, rows, columns, width, C, V, H, DESCRIPTORS, PRECISION)
    if SOFTCAP:
        z_CV = capped(z_CV, softcap)
    at_V = column + tl.arange(0, V)
    return tl.where(at_V[None, :] < columns, z_CV * scale_C[:, None], _LEAST_PEAK)


@triton.jit
def kl_parts(
    hidden_p, weight_p, hidden_q, weight_q, labels_C, inverse_temperature, parts_J7C,
    rows, columns, width_p, width_q, softcap,
    PART: tl.constexpr, C: tl.constexpr, V: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr,
    REVERSE: tl.constexpr, PER_ROW: tl.constexpr, SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write [7, C] statistics of both heads, in units of ln 2, for C rows and one part of the vocabulary."""
    row_block, part = placed(tl.program_id(0), tl.cdiv(rows, C), tl.cdiv(columns, PART), GROUP)
    row = row_block * C
    at_C = row + tl.arange(0, C)
    label_C = local_labels(labels_C, at_C, rows, columns)
    scale_C = row_scale(inverse_temperature, at_C, rows, PER_ROW) * _LOG2_E
    peak_p_C = tl.full((C,), _LEAST_PEAK, dtype=tl.float32)
    peak_q_C = tl.full((C,), _LEAST_PEAK, dtype=tl.float32)
    total_p_C = tl.zeros((C,), dtype=tl.float32)
    total_q_C = tl.zeros((C,), dtype=tl.float32)
    weighted_C = tl.zeros((C,), dtype=tl.float32)
    picked_C = tl.zeros((C,), dtype=tl.float32)
    cross_C = tl.zeros((C,), dtype=tl.float32)
    for column in tl.range(part * PART, min(part * PART + PART, columns), V):
        p_CV = scaled_logits(
            hidden_p, weight_p, row, column, rows, columns, width_p, softcap, scale_C, C, V, H, SOFTCAP,
            DESCRIPTORS, PRECISION,
        )  # fmt: skip
        q_CV = scaled_logits(
            hidden_q, weight_q, row, column, rows, columns, width_q, softcap, scale_C, C, V, H, SOFTCAP,
            DESCRIPTORS, PRECISION,
        )  # fmt: skip
        at_V = column + tl.arange(0, V)
        picked_C += tl.sum(tl.where(at_V[None, :] == label_C[:, None], p_CV, 0.0), 1)
        new_p_C, new_q_C = tl.maximum(peak_p_C, tl.max(p_CV, 1)), tl.maximum(peak_q_C, tl.max(q_CV, 1))
        shift_p_C, shift_q_C = peak_p_C - new_p_C, peak_q_C - new_q_C
        shrink_p_C, shrink_q_C = tl.exp2(shift_p_C), tl.exp2(shift_q_C)
        p_CV -= new_p_C[:, None]
        q_CV -= new_q_C[:, None]
        power_p_CV, power_q_CV = tl.exp2(p_CV), tl.exp2(q_CV)
        # The first block's shift is from the least peak: its product with a total of 0 is 0, alone or in
        # sums.
        if REVERSE:
            cross_C = shrink_p_C * (cross_C + (shift_p_C - shift_q_C) * total_p_C)
            cross_C += tl.sum(power_p_CV * (p_CV - q_CV), 1)
        else:
            cross_C = shrink_q_C * (cross_C + (shift_q_C - shift_p_C) * total_q_C)
            cross_C += tl.sum(power_q_CV * (q_CV - p_CV), 1)
        weighted_C = shrink_p_C * (weighted_C + shift_p_C * total_p_C) + tl.sum(power_p_CV * p_CV, 1)
        total_p_C = shrink_p_C * total_p_C + tl.sum(power_p_CV, 1)
        total_q_C = shrink_q_C * total_q_C + tl.sum(power_q_CV, 1)
        peak_p_C, peak_q_C = new_p_C, new_q_C
    out = parts_J7C + part.to(tl.int64) * 7 * rows + at_C
    tl.store(out, peak_p_C, mask=at_C < rows)
    tl.store(out + rows, total_p_C, mask=at_C < rows)
    tl.store(out + 2 * rows, weighted_C, mask=at_C < rows)
    tl.store(out + 3 * rows, picked_C, mask=at_C < rows)
    tl.store(out + 4 * rows, peak_q_C, mask=at_C < rows)
    tl.store(out + 5 * rows, total_q_C, mask=at_C < rows)
    tl.store(out + 6 * rows, cross_C, mask=at_C < rows)


@triton.jit
def merge_kl_parts(parts_J7C, merged_7C, parts, rows, C: tl.constexpr, REVERSE: tl.constexpr):
    """Merge the [J, 7, rows] parts of C rows in index order into [7, rows]."""
    at_C = tl.program_id(0) * C + tl.arange(0, C)
    inside_C = at_C < rows
    peak_p_C = tl.full((C,), _LEAST_PEAK, dtype=tl.float32)
    peak_q_C = tl.full((C,), _LEAST_PEAK, dtype=tl.float32)
    total_p_C = tl.zeros((C,), dtype=tl.float32)
    total_q_C = tl.zeros((C,), dtype=tl.float32)
    weighted_C = tl.zeros((C,), dtype=tl.float32)
    picked_C = tl.zeros((C,), dtype=tl.float32)
    cross_C = tl.zeros((C,), dtype=tl.float32)
    for part in range(parts):
        here = parts_J7C + tl.cast(part, tl.int64) * 7 * rows + at_C
        other_p_C = tl.load(here, mask=inside_C, other=0.0)
        other_total_p_C = tl.load(here + rows, mask=inside_C, other=0.0)
        other_q_C = tl.load(here + 4 * rows, mask=inside_C, other=0.0)
        other_total_q_C = tl.load(here + 5 * rows, mask=inside_C, other=0.0)
        new_p_C, new_q_C = tl.maximum(peak_p_C, other_p_C), tl.maximum(peak_q_C, other_q_C)
        left_p_C, left_q_C = peak_p_C - new_p_C, peak_q_C - new_q_C
        right_p_C, right_q_C = other_p_C - new_p_C, other_q_C - new_q_C
        other_weighted_C = tl.load(here + 2 * rows, mask=inside_C, other=0.0)
        other_cross_C = tl.load(here + 6 * rows, mask=inside_C, other=0.0)
        if REVERSE:
            cross_C = tl.exp2(left_p_C) * (cross_C + (left_p_C - left_q_C) * total_p_C)
            cross_C += tl.exp2(right_p_C) * (other_cross_C + (right_p_C - right_q_C) * other_total_p_C)
        else:
            cross_C = tl.exp2(left_q_C) * (cross_C + (left_q_C - left_p_C) * total_q_C)
            cross_C += tl.exp2(right_q_C) * (other_cross_C + (right_q_C - right_p_C) * other_total_q_C)
        weighted_C = tl.exp2(left_p_C) * (weighted_C + left_p_C * total_p_C)
        weighted_C += tl.exp2(right_p_C) * (other_weighted_C + right_p_C * other_total_p_C)
        total_p_C = tl.exp2(left_p_C) * total_p_C + tl.exp2(right_p_C) * other_total_p_C
        total_q_C = tl.exp2(left_q_C) * total_q_C + tl.exp2(right_q_C) * other_total_q_C
        picked_C += tl.load(here + 3 * rows, mask=inside_C, other=0.0)
        peak_p_C, peak_q_C = new_p_C, new_q_C
    tl.store(merged_7C + at_C, peak_p_C, mask=inside_C)
    tl.store(merged_7C + rows + at_C, total_p_C, mask=inside_C)
    tl.store(merged_7C + 2 * rows + at_C, weighted_C, mask=inside_C)
    tl.store(merged_7C + 3 * rows + at_C, picked_C, mask=inside_C)
    tl.store(merged_7C + 4 * rows + at_C, peak_q_C, mask=inside_C)
    tl.store(merged_7C + 5 * rows + at_C, total_q_C, mask=inside_C)
    tl.store(merged_7C + 6 * rows + at_C, cross_C, mask=inside_C)


@triton.jit
def jsd_parts(
    hidden_p, weight_p, hidden_q, weight_q, inverse_temperature, log_total_p_C, log_total_q_C, parts_J2C,
    rows, columns, width_p, width_q, softcap, log_beta, log_rest,
    PART: tl.constexpr, C: tl.constexpr, V: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr,
    PER_ROW: tl.constexpr, SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write [2, C] sums of p (log2 p - log2 m) and q (log2 q - log2 m) over one part.

    log_total_p_C, log_total_q_C: [rows] log2 of sum 2^z; log_beta, log_rest: log2 of beta and of 1 - beta.
    """
    row_block, part = placed(tl.program_id(0), tl.cdiv(rows, C), tl.cdiv(columns, PART), GROUP)
    row = row_block * C
    at_C = row + tl.arange(0, C)
    scale_C = row_scale(inverse_temperature, at_C, rows, PER_ROW) * _LOG2_E
    all_p_C = tl.load(log_total_p_C + at_C, mask=at_C < rows, other=0.0)
    all_q_C = tl.load(log_total_q_C + at_C, mask=at_C < rows, other=0.0)
    from_p_C = tl.zeros((C,), dtype=tl.float32)
    from_q_C = tl.zeros((C,), dtype=tl.float32)
    for column in tl.range(part * PART, min(part * PART + PART, columns), V):
        p_CV = scaled_logits(
            hidden_p, weight_p, row, column, rows, columns, width_p, softcap, scale_C, C, V, H, SOFTCAP,
            DESCRIPTORS, PRECISION,
        )  # fmt: skip
        q_CV = scaled_logits(
            hidden_q, weight_q, row, column, rows, columns, width_q, softcap, scale_C, C, V, H, SOFTCAP,
            DESCRIPTORS, PRECISION,
        )  # fmt: skip
        p_CV -= all_p_C[:, None]
        q_CV -= all_q_C[:, None]
        m_CV = log2_mixture(p_CV, q_CV, log_beta, log_rest)
        from_p_C += tl.sum(tl.exp2(p_CV) * (p_CV - m_CV), 1)
        from_q_C += tl.sum(tl.exp2(q_CV) * (q_CV - m_CV), 1)
    out = parts_J2C + part.to(tl.int64) * 2 * rows + at_C
    tl.store(out, from_p_C, mask=at_C < rows)
    tl.store(out + rows, from_q_C, mask=at_C < rows)


@triton.jit
def log2_mixture(log_p, log_q, log_beta, log_rest):
    """Return log2(beta p + (1 - beta) q) from base-2 logarithms, finite where both probabilities are 0."""
    left, right = log_p + log_beta, log_q + log_rest
    high = tl.maximum(left, right)
    return high + tl.log2(1.0 + tl.exp2(tl.minimum(left, right) - high))


@triton.jit
def sum_parts(parts_J2C, summed_2C, parts, width, C: tl.constexpr):
    """Add [width] numbers of each part in index order."""
    at_C = tl.program_id(0) * C + tl.arange(0, C)
    total_C = tl.zeros((C,), dtype=tl.float32)
    for part in range(parts):
        total_C += tl.load(parts_J2C + tl.cast(part, tl.int64) * width + at_C, mask=at_C < width, other=0.0)
    tl.store(summed_2C + at_C, total_C, mask=at_C < width)


@triton.jit
def kl_gradient(
    logits_p_CV, logits_q_CV, grad_CV, labels_C, logsumexp_p_C, logsumexp_q_C, divergence_C, entropy_C,
    grad_kl_C, grad_logprob_C, grad_entropy_C, inverse_temperature, columns, softcap, beta, log_beta,
    log_rest, V: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr, PER_ROW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one row of [rows, columns] to hidden_p @ weight_p.T.

    divergence_C: [rows] KL(p || q), or KL(p || m) for the Jensen-Shannon divergence; nats throughout.
    """
    row = tl.program_id(0)
    label = tl.load(labels_C + row)
    all_p, all_q = tl.load(logsumexp_p_C + row), tl.load(logsumexp_q_C + row)
    mean, entropy = tl.load(divergence_C + row), tl.load(entropy_C + row)
    g_kl, g_logprob = tl.load(grad_kl_C + row), tl.load(grad_logprob_C + row)
    g_entropy = tl.load(grad_entropy_C + row)
    temperature = tl.load(inverse_temperature + row) if PER_ROW else tl.load(inverse_temperature)
    corner = row.to(tl.int64) * columns
    active = (g_kl != 0.0) | (g_logprob != 0.0) | (g_entropy != 0.0)
    for start in range(0, columns, V):
        at_V = start + tl.arange(0, V)
        z_V = tl.load(logits_p_CV + corner + at_V, mask=at_V < columns, other=0.0).to(tl.float32)
        log_q_V = tl.load(logits_q_CV + corner + at_V, mask=at_V < columns, other=0.0).to(tl.float32) - all_q
        log_p_V = z_V - all_p
        p_V = tl.exp2(log_p_V * _LOG2_E)
        if FORWARD:
            slope_V = p_V - tl.exp2(log_q_V * _LOG2_E)
        elif REVERSE:
            slope_V = p_V * (log_p_V - log_q_V - mean)
        else:
            log2_p_V = log_p_V * _LOG2_E
            log_m_V = log2_mixture(log2_p_V, log_q_V * _LOG2_E, log_beta, log_rest) / _LOG2_E
            slope_V = beta * p_V * (log_p_V - log_m_V - mean)
        dz_V = g_kl * slope_V - p_V * (g_logprob + g_entropy * (log_p_V + entropy))
        dz_V += tl.where(at_V == label, g_logprob, 0.0)
        if SOFTCAP:
            squashed_V = z_V / (temperature * softcap)
            dz_V *= 1.0 - squashed_V * squashed_V
        dz_V = tl.where(active, dz_V * temperature, 0.0)
        tl.store(grad_CV + corner + at_V, dz_V.to(grad_CV.dtype.element_ty), mask=at_V < columns)
