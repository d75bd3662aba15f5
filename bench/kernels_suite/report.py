"""Writes what was measured: JSON lines as it comes, then a Markdown table and an SVG."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

Row = dict[str, Any]
ROWS: Final = "rows.jsonl"
TABLE: Final = "table.md"
PICTURE: Final = "ratios.svg"
ENVIRONMENT: Final = "environment.json"
HEADER: Final = (
    "variant", "median ms", "20–80 %", "× eager", "% ceiling", "rate", "extra MB", "launches", "host µs",
    "worst error", "leaves out",
)  # fmt: skip
NOTES: Final = """\
× eager: eager's time over this one's, the median over rounds. % ceiling: the time of the matrix products
alone (or of a copy of the least bytes), measured in the same rounds, over this one's. Rate: the case's least
FLOPs or bytes over the time. Extra MB: peak memory of one call beyond its inputs, results included. Worst
error: greatest of the outputs' errors against float64 (relative norm; log-probability, entropy and KL over
the greatest logit). Each row of rows.jsonl has the command that repeats it.
"""


def clean(value: Any) -> Any:
    """Return a value that JSON can hold: NaN and infinities as text."""
    if isinstance(value, dict):
        return {name: clean(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [clean(member) for member in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def start(folder: Path, environment: Row) -> None:
    """Make the folder, with the environment and no rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ENVIRONMENT).write_text(_json(environment, indent=1), encoding="utf-8")
    (folder / ROWS).write_text("", encoding="utf-8")


def append(folder: Path, row: Row, name: str = ROWS) -> None:
    """Add one row at once, so that a run that is cut off keeps what it measured."""
    with (folder / name).open("a", encoding="utf-8") as file:
        file.write(_json(row))


def finish(folder: Path, environment: Row, rows: Sequence[Row]) -> None:
    """Write the table, and the picture where matplotlib is installed."""
    (folder / TABLE).write_text(table(environment, rows), encoding="utf-8")
    try:
        from kernels_suite.picture import draw
    except ImportError:
        return
    draw(folder / PICTURE, environment, rows)


def table(environment: Row, rows: Sequence[Row]) -> str:
    """Return the Markdown of all rows: environment, one table a case, and what was not measured."""
    ceilings = environment["ceilings"]
    machine = f"{environment['class']}, {environment['threads']} threads"
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    lines = [
        f"# Kernels on {machine}",
        "",
        f"{environment['time']}, commit {environment['commit']}, Python {environment['python']}, {packages}.",
        f"Ceilings: copy {ceilings['copy_gb_s']:.1f} GB/s; matmul {ceilings['matmul']} "
        f"{ceilings['matmul_tflop_s']:.3g} TFLOP/s. Load at start {environment['load_at_start']:.2f}.",
        "",
        NOTES,
    ]
    for _, group in groupby(rows, key=lambda row: (row["op"], row["mode"], row["shape"], row["dtype"])):
        members = list(group)
        first = members[0]
        dims = ", ".join(f"{name} {value:,g}" for name, value in first["dims"].items())
        ceiling = next(
            (f"; ceiling {row['ceiling']:.3g} {row['unit']}" for row in members if "ceiling" in row), ""
        )
        heading = f"## {first['op']}, {first['mode']}, {first['shape']}"
        ratio_to = "" if first["ratio_to"] == "eager" else f"; × eager is × {first['ratio_to']} here"
        lines += [heading, "", f"{dims}, {first['dtype']}{ceiling}{ratio_to}", ""]
        measured = [row for row in members if row["status"] == "measured"]
        if measured:
            lines += [_line(HEADER), _line(["---"] * len(HEADER)), *map(_measured, measured), ""]
        others = [row for row in members if row["status"] != "measured"]
        lines += [f"- {row['variant']}: {row['status']}. {row['note']}" for row in others]
        lines += [""] if others else []
    return "\n".join(lines).rstrip("\n") + "\n"


def _measured(row: Row) -> str:
    extra = row.get("peak_extra_bytes")
    facts = "; ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in row.get("facts", {}).items())
    return _line(
        (
            f"**{row['variant']}**" if row["ours"] else row["variant"],
            f"{row['median_ms']:.4g}",
            f"{row['p20_ms']:.4g}–{row['p80_ms']:.4g}",
            _figure(row.get("ratio_to_eager"), ".2f"),
            _figure(row.get("percent_of_ceiling"), ".0f"),
            "–" if "rate" not in row else f"{row['rate']:.3g} {row['unit']}",
            "–" if extra is None else f"{extra / 1e6:.1f}",
            _figure(row.get("launches"), "d"),
            _figure(row.get("host_us"), ".1f"),
            _figure(row.get("worst_error"), ".1e"),
            "; ".join(filter(None, (row["lacks"], facts))) or "–",
        )
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(clean(value), ensure_ascii=False, indent=indent, allow_nan=False) + "\n"
