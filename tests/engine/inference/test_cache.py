"""The key-value cache: any mix of prefill and decoding gives what one whole pass gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from slipstream.attention import PackedSegments, run_decoder
from slipstream.inference.cache import Feed, SlotCache

ModelMaker = Callable[..., PreTrainedModel]


def plan(
    cache: SlotCache,
    rows: list[int],
    starts: list[int],
    spans: list[int],
    *,
    shared: list[int] | None = None,
) -> Feed:
    """Plan a pass; rows of one token decode."""
    rows_B, starts_B, spans_B = (np.array(x, np.int32) for x in (rows, starts, spans))
    common = np.array(shared or [0] * len(rows), np.int64)
    return cache.plan(rows_B, starts_B, spans_B, decodes=spans_B == 1, shared=common)


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
        feed = plan(cache, chosen, [held[row] for row in chosen], spans)
        assert feed.last.tolist() == (np.cumsum(spans) - 1).tolist()
        found = run_decoder(
            model, torch.from_numpy(np.concatenate(parts)), torch.from_numpy(feed.positions), cache
        )
        offset = 0
        for row, span in zip(chosen, spans, strict=True):
            held[row] += span
            whole = torch.from_numpy(tokens[row][: held[row]])
            bounds = torch.tensor([0, held[row]])
            expected = run_decoder(model, whole, torch.arange(held[row]), PackedSegments(bounds))
            torch.testing.assert_close(found[offset : offset + span], expected[-span:], atol=2e-5, rtol=1e-4)
            offset += span
    assert max(held.values()) > 32


@pytest.mark.parametrize("kv_heads", [4, 1])
@torch.no_grad()
def test_a_common_beginning_is_fed_once(make_model: ModelMaker, kv_heads: int) -> None:
    """Rows 5 and 0 begin with 6 tokens of row 2, row 3 is row 0 up to its 9th token; then all decode."""
    model = make_model(kv_heads=kv_heads)
    cache = SlotCache(model, rows=8, max_tokens=80)
    random = np.random.default_rng(4)
    base = random.integers(0, 37, 12)
    tokens = {2: base, 5: np.append(base[:6], [1, 2]), 0: np.append(base[:6], [3, 4, 5, 6])}
    tokens[3] = tokens[0][:9]
    rows, shared = [2, 5, 0, 3], [0, 6, 6, 9]
    spans = [len(tokens[row]) for row in rows]
    feed = plan(cache, rows, [0] * 4, spans, shared=shared)
    assert feed.rows.tolist() == [2] * 12 + [5] * 2 + [0] * 4
    assert feed.positions.tolist() == [*range(12), 6, 7, 6, 7, 8, 9]
    assert feed.last.tolist() == [11, 13, 17, 16]
    fed = np.array([tokens[row][p] for row, p in zip(feed.rows, feed.positions, strict=True)])
    found = run_decoder(model, torch.from_numpy(fed), torch.from_numpy(feed.positions), cache)[feed.last]
    after = plan(cache, rows, spans, [1] * 4)
    last = torch.tensor([7, 8, 9, 10])
    next_found = run_decoder(model, last, torch.from_numpy(after.positions), cache)
    for place, row in enumerate(rows):
        whole = torch.cat([torch.from_numpy(tokens[row]), last[place : place + 1]])
        bounds = torch.tensor([0, len(whole)])
        expected = run_decoder(model, whole, torch.arange(len(whole)), PackedSegments(bounds))
        torch.testing.assert_close(found[place], expected[-2], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(next_found[place], expected[-1], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_copied_row_goes_on_like_its_source(make_model: ModelMaker) -> None:
    model = make_model()
    cache = SlotCache(model, rows=3, max_tokens=64)
    tokens = torch.arange(12)
    fed = plan(cache, [2], [0], [9])
    run_decoder(model, tokens[:9], torch.from_numpy(fed.positions), cache)
    cache.copy(2, 0, 7)
    feed = plan(cache, [0], [7], [5])
    found = run_decoder(model, tokens[7:], torch.from_numpy(feed.positions), cache)
    expected = run_decoder(model, tokens, torch.arange(12), PackedSegments(torch.tensor([0, 12])))
    torch.testing.assert_close(found, expected[7:], atol=2e-5, rtol=1e-4)
