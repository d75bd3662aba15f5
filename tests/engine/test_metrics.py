"""Rows survive torn lines and resumes; statistics against literal numbers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slipstream import metrics


def test_rows_come_back_in_the_order_of_steps(tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE
    for step in (2, 1):
        metrics.append_row(path, {"kind": "train", "step": step, "success": 0.5, "time": 10.0 + step})
    assert [(row["step"], row["time"]) for row in metrics.read_rows(tmp_path)] == [(1, 11.0), (2, 12.0)]
    assert metrics.read_rows(tmp_path / "none") == []


def test_after_a_resume_the_later_row_counts(tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE
    for reward, kind in ((0.1, "train"), (0.2, "evaluation"), (0.3, "train")):
        metrics.append_row(path, {"kind": kind, "step": 5, "reward": reward})
    rows = metrics.read_rows(tmp_path)
    assert [row["reward"] for row in metrics.rows_of(rows, "train")] == [0.3]
    assert [row["reward"] for row in metrics.rows_of(rows, "evaluation")] == [0.2]


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE
    metrics.append_row(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "suc')
    assert [row["step"] for row in metrics.read_rows(tmp_path)] == [1]
    metrics.append_row(path, {"step": 3})
    assert [row["step"] for row in metrics.read_rows(tmp_path)] == [1, 3]


def test_rows_hold_plain_numbers(tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE
    metrics.append_row(path, {"step": np.int64(3), "loss": float("nan"), "slip/histogram": np.array([1, 2])})
    row = json.loads(path.read_text())
    assert (row["step"], row["loss"], row["slip/histogram"]) == (3, None, [1, 2])
    assert row["time"] > 1e9


def test_writers_in_several_processes_do_not_mix_lines(tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE
    code = "import sys; from pathlib import Path; from slipstream.metrics import append_row\n"
    code += "row = {'kind': sys.argv[2], 'pad': 'x' * 500}\n"
    code += "for step in range(200): append_row(Path(sys.argv[1]), {**row, 'step': step})"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), kind]) for kind in ("a", "b")]
    assert [writer.wait(timeout=100) for writer in writers] == [0, 0]
    assert len(metrics.read_rows(tmp_path)) == 400


def test_slip_statistics() -> None:
    row = metrics.slip_statistics(np.array([0] * 90 + [1] * 6 + [4] * 4), np.linspace(0.0, 9.9, 100))
    assert row["slip/mean"] == pytest.approx(0.22)
    assert (row["slip/p95"], row["slip/max"]) == (1.0, 4)
    assert row["slip/histogram"] == [90, 6, 0, 0, 4]
    assert row["slip/seconds_mean"] == pytest.approx(4.95)
    assert row["slip/seconds_p95"] == pytest.approx(9.4)
    assert row["slip/seconds_max"] == pytest.approx(9.9)
    assert metrics.undefined_names(row) == []
    assert metrics.slip_statistics([], []) == {"slip/histogram": []}


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),
        (5, 10, 0.236593, 0.763407),
        (10, 10, 0.722467, 1.0),
        (81, 263, 0.255284, 0.366186),
    ],
)
def test_wilson_interval(successes: int, n: int, low: float, high: float) -> None:
    assert metrics.wilson_interval(successes, n) == pytest.approx((low, high), abs=2e-4)
    assert metrics.wilson_interval(0, 0) == (0.0, 1.0)


def test_unknown_names_are_found() -> None:
    assert metrics.undefined_names({"step": 1, "reward/correct": 1.0, "slip/mode": 2}) == ["slip/mode"]
