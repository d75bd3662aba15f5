"""Floor 4. The learning curve of a run, drawn from its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slipstream.errors import RunFolderError
from slipstream.metrics import Row, read_rows, rows_of, wilson_interval
from slipstream.run_folder import read_json
from slipstream.summary import BASELINES, warm_start_success

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE = "learning_curve.png"
_HELD_OUT = "#0b6e99"
_TRAINING = "#b8860b"
_GIVEN = "#c0392b"
_BASELINES = ("#7a7a7a", "#a04000", "#5b4a9e", "#2e7d32", "#444444")
_STAGES = "#9a6fb0"
_SMOOTHING = 9
"""Train rows averaged into one point of the thin line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Baseline:
    """A dashed line."""

    label: str
    success: float
    given: bool = False
    """Whether it is of somebody else's policy."""


def learning_curve(folder: Path) -> Path:
    """Draw held-out success against steps and against wall-clock into learning_curve.png.

    The band is the 95 % Wilson interval; the thin line is training success; dashed lines are the
    baselines with their sources; a star marks the best checkpoint; thin upright lines are the changes of a
    curriculum's stage.

    Raises: RunFolderError when the folder holds no metrics.
    """
    rows = read_rows(folder)
    if not rows:
        raise RunFolderError(f"{folder} holds no metrics.jsonl to plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 5.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    minutes = _minutes(rows)
    evaluations = [row for row in rows_of(rows, "evaluation") if row.get("success") is not None]
    baselines = _baselines(folder, rows)
    for axes, x_of in ((left, {id(row): float(row["step"]) for row in rows}), (right, minutes)):
        _draw_training(axes, rows_of(rows, "train"), x_of)
        _draw_held_out(axes, evaluations, x_of)
        _draw_stages(axes, rows_of(rows, "train"), x_of)
        _draw_baselines(axes, baselines)
        _dress(axes)
    left.set_xlabel("optimizer steps")
    right.set_xlabel("wall-clock minutes of training")
    left.set_ylabel("success")
    figure.suptitle(f"Held-out success · {folder.name}", x=0.01, ha="left", fontsize=14, fontweight="bold")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path = folder / FILE
    figure.savefig(path)
    return path


def _minutes(rows: Sequence[Row]) -> dict[int, float]:
    """Return each row's minutes of training time; a pause between two rows counts as one usual step.

    Rows of a resumed run lie hours apart on the clock without any work between them.
    """
    timed = sorted((row for row in rows if row.get("kind") != "warmup"), key=lambda row: float(row["time"]))
    gaps = np.diff([float(row["time"]) for row in timed]) if len(timed) > 1 else np.zeros(0)
    usual = float(np.median(gaps)) if gaps.size else 0.0
    worked = np.where(gaps > max(60.0, 20.0 * usual), usual, gaps)
    elapsed = np.concatenate([[0.0], np.cumsum(worked)])
    return {id(row): float(seconds) / 60.0 for row, seconds in zip(timed, elapsed, strict=False)}


def _draw_held_out(axes: Axes, evaluations: Sequence[Row], x_of: dict[int, float]) -> None:
    if not evaluations:
        return
    x = [x_of[id(row)] for row in evaluations]
    success = [float(row["success"]) for row in evaluations]
    counts = [int(row.get("tasks") or 0) for row in evaluations]
    bounds = [wilson_interval(round(p * n), n) for p, n in zip(success, counts, strict=True)]
    if all(counts):
        low, high = [bound[0] for bound in bounds], [bound[1] for bound in bounds]
        axes.fill_between(x, low, high, color=_HELD_OUT, alpha=0.16, linewidth=0, label="95 % interval")
    label = "held-out success"
    axes.plot(x, success, color=_HELD_OUT, linewidth=2.2, marker="o", markersize=3.5, label=label)
    best = int(np.argmax(success))
    label = f"best checkpoint, step {evaluations[best]['step']:.0f}: {success[best]:.3f}"
    axes.plot(
        x[best], success[best], linestyle="none", marker="*", markersize=15, markeredgecolor="white",
        color="#c0392b", zorder=5, label=label,
    )  # fmt: skip


def _draw_training(axes: Axes, rows: Sequence[Row], x_of: dict[int, float]) -> None:
    rows = [row for row in rows if row.get("success") is not None]
    if not rows:
        return
    success = np.asarray([float(row["success"]) for row in rows])
    half = _SMOOTHING // 2
    smooth = [success[max(0, i - half) : i + half + 1].mean() for i in range(len(success))]
    x = [x_of[id(row)] for row in rows]
    axes.plot(x, smooth, color=_TRAINING, linewidth=0.9, alpha=0.8, label="training success")


def stage_changes(rows: Sequence[Row]) -> list[tuple[Row, int]]:
    """Return the train rows in which a curriculum's stage is not that of the row before, and their stage."""
    staged = [(row, int(row["curriculum/stage"])) for row in rows if row.get("curriculum/stage") is not None]
    return [after for before, after in pairwise(staged) if before[1] != after[1]]


def _draw_stages(axes: Axes, rows: Sequence[Row], x_of: dict[int, float]) -> None:
    for count, (row, stage) in enumerate(stage_changes(rows)):
        label = "another stage of the curriculum" if not count else None
        axes.axvline(x_of[id(row)], color=_STAGES, linewidth=0.8, alpha=0.7, zorder=1, label=label)
        axes.annotate(f"{stage}", (x_of[id(row)], 0.01), xycoords=("data", "axes fraction"), fontsize=7,
                      color=_STAGES, xytext=(2, 0), textcoords="offset points")  # fmt: skip


def _baselines(folder: Path, rows: Sequence[Row]) -> list[_Baseline]:
    """Return the lines of baselines.json and the warm start, each with its source."""
    lines = [
        _Baseline(
            label=f"{name.replace('_', ' ')}: {item['success']:.3f} ({_source(item)})",
            success=float(item["success"]),
            given="date" in item,
        )
        for name, item in read_json(folder / BASELINES).items()
    ]
    warm = warm_start_success(folder, rows)
    if warm is not None and not any(line.label.startswith("warm start") for line in lines):
        lines.append(_Baseline(label=f"warm start: {warm:.3f} (held-out, before training)", success=warm))
    return sorted(lines, key=lambda line: line.success)


def _source(item: Mapping[str, Any]) -> str:
    return ", ".join(str(item[key]) for key in ("source", "date") if key in item) or "no source"


def _draw_baselines(axes: Axes, baselines: Sequence[_Baseline]) -> None:
    for index, line in enumerate(baselines):
        color = _GIVEN if line.given else _BASELINES[index % len(_BASELINES)]
        dashes = (0, (5, 3))
        axes.axhline(line.success, color=color, linestyle=dashes, linewidth=1.2, label=line.label, zorder=1)


def _dress(axes: Axes) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks(np.linspace(0.0, 1.0, 6))
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.set_xlim(left=0.0)
