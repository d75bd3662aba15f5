"""Draws the ratios to eager PyTorch, one bar a variant, one group a case."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

Row = dict[str, Any]
OURS: Final = "#1f77b4"
PEER: Final = "#b0b0b0"
INCHES_OF_BAR: Final = 0.2


def draw(path: Path, environment: Row, rows: Sequence[Row]) -> None:
    """Write an SVG of all measured ratios, on a logarithmic axis with eager at 1."""
    labels, ratios, colours = [], [], []
    shown = [row for row in rows if row.get("ratio_to_eager") is not None]
    for _, group in groupby(shown, key=lambda row: (row["op"], row["mode"], row["shape"])):
        for row in group:
            labels.append(f"{row['op']} · {row['mode']} · {row['shape']} · {row['variant']}")
            ratios.append(row["ratio_to_eager"])
            colours.append(OURS if row["ours"] else PEER)
    figure = Figure(figsize=(11, 1.2 + INCHES_OF_BAR * max(1, len(labels))), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(labels)), ratios, color=colours)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    if ratios:
        axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast as eager PyTorch (blue: slipstream_kernels)")
    axes.set_title(f"{environment['class']}, {environment['time'][:10]}", fontsize=9)
    figure.savefig(path, format="svg")
