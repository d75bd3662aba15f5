"""Floor 1. What is kept of a row of logits: four numbers, which parts of a vocabulary merge in order.

With z the logits of a row in units of ln 2 (z = logit * log2 e), over any part of the vocabulary:

    peak = max z,   total = sum 2^(z - peak),   weighted = sum 2^(z - peak) (z - peak),   label = z_label

`label` is 0 in a part that does not hold the label. Relative to the peak: entropy as logsumexp - mean logit
would cancel for confident rows. Parts are merged one after another in the order of the vocabulary, so that
the bits do not depend on who computed which part; shards that were merged before differ by rounding.

Dimensions: N rows, K parts of the vocabulary.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

LOG2_E: Final = 1.0 / math.log(2.0)
LN_2: Final = math.log(2.0)
PART_COLUMNS: Final = 1024
"""Columns of one part."""
LEAST_PEAK: Final = -1e30
"""Peak of a part without a column: finite, so that no difference of two peaks is NaN."""


def merge(parts_K4N: Tensor) -> Tensor:
    """Return [4, N] statistics of a vocabulary from those of its parts, merged in index order."""
    merged = parts_K4N[0]
    for part in parts_K4N[1:]:
        merged = _merge_two(merged, part)
    return merged


def finish(statistics_4N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return [N] log-probability of the label, entropy and log-sum-exp, in nats.

    logprob = ln 2 (label - peak - log2 total)
    entropy = ln 2 (log2 total - weighted / total)
    logsumexp = ln 2 (peak + log2 total)
    """
    peak, total, weighted, label = statistics_4N
    spread = total.log2()
    return LN_2 * (label - peak - spread), LN_2 * (spread - weighted / total), LN_2 * (peak + spread)


def _merge_two(left_4N: Tensor, right_4N: Tensor) -> Tensor:
    peak = torch.maximum(left_4N[0], right_4N[0])
    left_shift, right_shift = left_4N[0] - peak, right_4N[0] - peak
    left_scale, right_scale = left_shift.exp2(), right_shift.exp2()
    return torch.stack(
        (
            peak,
            left_scale * left_4N[1] + right_scale * right_4N[1],
            left_scale * (left_4N[2] + left_shift * left_4N[1])
            + right_scale * (right_4N[2] + right_shift * right_4N[1]),
            left_4N[3] + right_4N[3],
        )
    )
