"""Every op and backend against float64: errors, limits, verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from kernels_suite import accuracy, measure
from kernels_suite.attempt import NONE, Failure
from kernels_suite.plan import Case, Place, Scale
from kernels_suite.suite import CASES

Row = dict[str, Any]
PASS: Final = "pass"
FAIL: Final = "FAIL"
HEADER: Final = (
    "| op | backend | mode | shape | type | output | error | limit | verdict |\n" + "| --- " * 9 + "|"
)


def cases(device: str) -> Iterator[Case]:
    """Yield every op at odd shapes, in float32 and, where it takes it, bfloat16."""
    seen = set()
    for op, make in CASES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for case in make(Place(device=device, scale=Scale.CHECK, dtype=dtype)):
                if case.key not in seen and not case.host_only:
                    seen.add(case.key)
                    yield case
        seen.add(op)


def verdicts(case: Case) -> Iterator[Row]:
    """Yield a row for each backend: its output nearest to its limit, or why there is none."""
    eager: dict[str, float] = {}
    for variant, errors in measure.comparisons(case):
        if variant.name == case.eager and not isinstance(errors, Failure):
            eager = errors
        if not variant.ours or (isinstance(errors, Failure) and errors.status == NONE):
            continue
        row = {
            "op": case.op,
            "backend": variant.name,
            "mode": case.mode,
            "shape": case.shape,
            "dtype": str(case.dtype).removeprefix("torch."),
        }
        if isinstance(errors, Failure):
            yield row | {"verdict": errors.status, "note": errors.note}
            continue
        limits = {name: accuracy.limit(case, name, eager.get(name)) for name in errors}
        worst = max(errors, key=lambda name: _excess(errors[name], limits[name]))
        good = all(errors[name] <= limits[name] for name in errors)
        yield row | {
            "output": worst,
            "error": errors[worst],
            "limit": limits[worst],
            "errors": errors,
            "verdict": PASS if good else FAIL,
        }


def failed(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that are wrong, not those that are not to be had here."""
    return [row for row in rows if row["verdict"] not in {PASS, "absent"}]


def table(rows: Sequence[Row]) -> str:
    """Return the Markdown of all verdicts, the wrong ones first."""
    wrong = failed(rows)
    good = sum(row["verdict"] == PASS for row in rows)
    lines = [
        "# Every op and backend against float64",
        "",
        f"{good} pass, {len(wrong)} fail, {len(rows) - good - len(wrong)} are not to be had here.",
        "",
        HEADER,
        "| --- " * 9 + "|",
        *(_line(row) for row in [*wrong, *(row for row in rows if row not in wrong)]),
    ]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    front = f"| {row['op']} | {row['backend']} | {row['mode']} | {row['shape']} | {row['dtype']} "
    if "error" not in row:
        return f"{front}| – | – | – | {row['verdict']}: {row['note']} |"
    # Rows that crossed a pipe hold NaN as text.
    error = f"{float(row['error']):.1e}"
    return f"{front}| {row['output']} | {error} | {row['limit']:.1e} | {row['verdict']} |"


def _excess(error: float, limit: float) -> float:
    if math.isnan(error):
        return math.inf
    return error / limit if limit else error
