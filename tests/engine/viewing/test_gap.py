"""The gap is what the model itself says of each token, beside what was recorded."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from slipstream import synthetic
from slipstream.types import Sampling
from slipstream.viewing.gap import GapScorer


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gap_is_the_models_logprob_minus_the_recorded_one(make_model, temperature: float) -> None:  # type: ignore[no-untyped-def]
    model = make_model().eval()
    base = synthetic.trajectory(24, turns=2)
    tokens = (base.token_ids % 37).astype(np.int32)
    made = dataclasses.replace(
        base, token_ids=tokens, segments=(16,), sampling=Sampling(temperature=temperature)
    )
    gap_T = GapScorer(model)(made)
    assert gap_T is not None
    expected = np.full(24, np.nan)
    for span in made.spans:
        ids = torch.from_numpy(tokens[span].astype(np.int64))[None]
        with torch.no_grad():
            logprobs = torch.log_softmax(make_model(installed=False).eval()(ids).logits[0] / temperature, -1)
        for t in range(span.start + 1, span.stop):
            if made.loss_mask[t]:
                said = logprobs[t - span.start - 1, tokens[t]].item()
                expected[t] = said - made.behavior_logprobs[t]
    # The first token of the second segment was sampled, but nothing predicts it.
    assert made.loss_mask[16] and np.isnan(gap_T[16])
    np.testing.assert_allclose(gap_T, expected, atol=2e-5)


def test_there_is_no_gap_to_a_greedy_sampler_or_another_vocabulary(make_model) -> None:  # type: ignore[no-untyped-def]
    scorer = GapScorer(make_model().eval())
    made = synthetic.trajectory(24)
    assert scorer(made) is None
    small = dataclasses.replace(made, token_ids=(made.token_ids % 37).astype(np.int32))
    assert scorer(small) is not None
    assert scorer(dataclasses.replace(small, sampling=Sampling(temperature=0.0))) is None
