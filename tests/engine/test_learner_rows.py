"""Rows of metrics reach metrics.jsonl once each, whichever hub was there to write them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from slipstream.learner_rows import KEPT_ROWS, LearnerRows
from slipstream.metrics import FILE, append_row


class Hub:
    """Writes what it is told while it lives."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lives, self.told = folder, True, list[tuple[str, float]]()

    def report(self, kind: str, row: dict[str, Any]) -> None:
        self.told.append((kind, row["step"]))
        if self.lives:
            append_row(self.folder / FILE, {"kind": kind, **row})


def values(loss: float = 0.5) -> dict[str, Any]:
    return {"loss": loss, "tokens/trained": 100.0}


def test_what_a_hub_took_with_it_is_said_again_and_nothing_else(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    rows = LearnerRows(tmp_path, hub.report)
    rows.report(1, values())
    hub.lives = False
    rows.report(2, values())
    rows.look()
    assert not rows.are_written()
    hub.lives = True
    rows.say_again()
    assert hub.told == [("train", 1.0), ("train", 2.0), ("train", 2.0)]
    rows.look()
    assert rows.are_written()


def test_a_checkpoint_carries_the_newest_rows_without_what_is_no_number(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    hub.lives = False
    before = LearnerRows(tmp_path, hub.report)
    for step in range(1, KEPT_ROWS + 3):
        before.report(step, values(math.nan if step == KEPT_ROWS else 0.25))
    kept = before.state()
    assert [row["step"] for row in kept] == list(range(3, KEPT_ROWS + 3))
    assert [row["step"] for row in kept if "loss" not in row] == [KEPT_ROWS]
    hub.lives, hub.told = True, []
    after = LearnerRows(tmp_path, hub.report)
    after.restore(kept)
    after.begin()
    assert hub.told == [("train", float(step)) for step in range(3, KEPT_ROWS + 3)]


def test_rates_are_of_the_time_since_the_row_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("slipstream.learner_rows.time.monotonic", lambda: now)
    rows = LearnerRows(tmp_path, Hub(tmp_path).report)
    rows.begin()
    rows.starved(1.0)
    now = 104.0
    rows.report(1, values())
    now = 105.0
    rows.starved(2.0)
    rows.report(2, values())
    first, second = rows.state()
    assert (first["seconds/step"], first["wait/learner_starved"], first["tokens/trained_per_s"]) == (
        4,
        0.25,
        25,
    )
    assert (second["seconds/step"], second["wait/learner_starved"]) == (1, 1.0)


def test_an_evaluation_is_known_once_it_is_written(tmp_path: Path) -> None:
    rows = LearnerRows(tmp_path, Hub(tmp_path).report)
    append_row(tmp_path / FILE, {"kind": "evaluation", "step": 4, "success": 0.5})
    assert not rows.is_evaluated(4)
    rows.look()
    assert rows.is_evaluated(4)
    assert not rows.is_evaluated(5)
