"""The key-value cache: any mix of prefill and decoding gives what one whole pass gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from slipstream.attention import PackedSegments, run_decoder
from slipstream.inference.cache import SlotCache

ModelMaker = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("rows", [(0, 1, 2), (7, 2, 5), (0, 7)], ids=["dense", "unordered", "sparse"])
@torch.no_grad()
def test_spans_equal_a_whole_pass(make_model: ModelMaker, kv_heads: int, rows: tuple[int, ...]) -> None:
    """Rows grow by spans of 1, odd and long sizes, past a step of the rounded cache length."""
    model = make_model(kv_heads=kv_heads)
    cache = SlotCache(model, rows=8, max_tokens=80)
    random = np.random.default_rng(3)
    tokens = {row: random.integers(0, 37, 80) for row in rows}
    held = dict.fromkeys(rows, 0)
    for _ in range(24):
        chosen = [row for row in rows if held[row] < 70 and random.random() < 0.8]
        if not chosen:
            continue
        spans = [int(random.choice([1, 1, 3, 9])) for _ in chosen]
        parts = [tokens[r][held[r] : held[r] + n] for r, n in zip(chosen, spans, strict=True)]
        starts = np.array([held[row] for row in chosen], np.int32)
        _, positions = cache.plan(np.array(chosen, np.int32), starts, np.array(spans, np.int32))
        found = run_decoder(model, torch.from_numpy(np.concatenate(parts)), positions, cache)
        offset = 0
        for row, span in zip(chosen, spans, strict=True):
            held[row] += span
            whole = torch.from_numpy(tokens[row][: held[row]])
            bounds = torch.tensor([0, held[row]])
            expected = run_decoder(model, whole, torch.arange(held[row]), PackedSegments(bounds))
            torch.testing.assert_close(found[offset : offset + span], expected[-span:], atol=2e-5, rtol=1e-4)
            offset += span
    assert max(held.values()) > 32
