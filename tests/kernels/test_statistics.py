"""Statistics of rows: parts merge into those of the whole, in nats against float64 softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream_kernels.statistics import LEAST_PEAK, LOG2_E, finish, merge
from slipstream_kernels.testing import assert_matches_reference


def statistics_of(logits_NV: Tensor, labels_N: Tensor, start: int, stop: int) -> Tensor:
    z = logits_NV[:, start:stop] * LOG2_E
    peak = z.amax(1) if stop > start else torch.full_like(logits_NV[:, 0], LEAST_PEAK)
    power = (z - peak[:, None]).exp2()
    inside = (labels_N >= start) & (labels_N < stop)
    label = logits_NV.gather(1, labels_N[:, None])[:, 0] * LOG2_E
    weighted = (power * (z - peak[:, None])).sum(1)
    return torch.stack([peak, power.sum(1), weighted, torch.where(inside, label, 0.0)])


def test_parts_merge_into_the_whole_row() -> None:
    logits, labels = 8 * torch.randn(5, 30), torch.randint(0, 30, (5,))
    logits[0, 7], logits[1] = -1e4, -1e4 - torch.arange(30.0)
    parts = [statistics_of(logits, labels, *cut) for cut in ((0, 11), (11, 11), (11, 12), (12, 30))]
    logprob, entropy, logsumexp = finish(merge(torch.stack(parts)))
    truth = torch.log_softmax(logits.double(), 1)
    assert_matches_reference(logsumexp, logits.double().logsumexp(1))
    # Rounding of numbers as large as the logits: 6e-8 * 1e4.
    torch.testing.assert_close(logprob.double(), truth.gather(1, labels[:, None])[:, 0], rtol=1e-5, atol=2e-3)
    assert_matches_reference(entropy, -(truth.exp() * truth).sum(1))
