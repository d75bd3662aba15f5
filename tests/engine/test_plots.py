"""The learning curve: both panels, their lines and their labels."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from slipstream import plots
from slipstream.errors import RunFolderError
from slipstream.metrics import FILE, append_row, read_rows, rows_of
from slipstream.run_folder import write_json


def fill(folder: Path) -> None:
    append_row(folder / FILE, {"kind": "warmup", "step": 10, "success": 0.4, "time": 50.0})
    for step in range(1, 21):
        pause = 7200.0 if step > 10 else 0.0
        row = {"kind": "train", "step": step, "success": step / 20, "time": 100.0 + 3 * step + pause}
        append_row(folder / FILE, row)
    for step, success in ((10, 0.8), (20, 0.7)):
        time = 100.0 + 3 * step + (7200.0 if step > 10 else 0.0)
        row = {"kind": "evaluation", "step": step, "success": success, "tasks": 100, "time": time}
        append_row(folder / FILE, row)
    source = {"success": 0.99, "source": "64 held-out tasks"}
    given = {"success": 0.65, "source": "its card", "date": "2026-11-01"}
    write_json(folder / "baselines.json", {"scripted_expert": source, "frontier": given})


def test_learning_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    figures: list[Figure] = []
    savefig = Figure.savefig

    def keep(figure: Figure, path: Path) -> None:
        figures.append(figure)
        savefig(figure, path)

    monkeypatch.setattr(Figure, "savefig", keep)
    path = plots.learning_curve(tmp_path)
    assert path == tmp_path / "learning_curve.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    steps, clock = figures[0].axes
    lines = {str(line.get_label()): np.asarray(line.get_xydata(), float) for line in steps.lines}
    np.testing.assert_allclose(lines["held-out success"], [(10, 0.8), (20, 0.7)])
    np.testing.assert_allclose(lines["best checkpoint, step 10: 0.800"], [(10, 0.8)])
    np.testing.assert_allclose(lines["scripted expert: 0.990 (64 held-out tasks)"], [(0, 0.99), (1, 0.99)])
    np.testing.assert_allclose(lines["frontier: 0.650 (its card, 2026-11-01)"], [(0, 0.65), (1, 0.65)])
    np.testing.assert_allclose(lines["warm start: 0.400 (held-out, before training)"], [(0, 0.4), (1, 0.4)])
    assert len(steps.collections) == 1
    held_out = next(line for line in clock.lines if line.get_label() == "held-out success")
    minutes = np.asarray(held_out.get_xydata(), float)
    # The two hours between two sessions are no work.
    np.testing.assert_allclose(minutes, [(0.45, 0.8), (0.95, 0.7)], atol=0.06)


def test_changes_of_a_stage_are_upright_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    rows = read_rows(tmp_path)
    for row in rows_of(rows, "train"):
        stage = 0.0 if row["step"] < 7 else 1.0 if row["step"] < 15 else 0.0
        append_row(tmp_path / FILE, {**row, "curriculum/stage": stage})
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _: drawn.append(figure))
    plots.learning_curve(tmp_path)
    upright = [line for line in drawn[0].axes[0].lines if list(line.get_ydata()) == [0, 1]]
    assert [float(line.get_xdata()[0]) for line in upright] == [7.0, 15.0]
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["1", "0"]
    changes = plots.stage_changes(rows_of(read_rows(tmp_path), "train"))
    assert [(row["step"], stage) for row, stage in changes] == [(7, 1), (15, 0)]


def test_a_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"holds no metrics.jsonl to plot"):
        plots.learning_curve(tmp_path)
