"""Floor 4. The summary of a finished run, drawn from the files in its folder alone.

Reads metrics.jsonl, status.json, baselines.json, times.json, restarts.json, the final evaluations, each a
JSON object with `success` and `tasks`, and, for what is lost or doubled, log and spools (audit.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from slipstream.audit import Audit, audit
from slipstream.config import RunConfig
from slipstream.metrics import Row, read_rows, rows_of, wilson_interval
from slipstream.restarts import restarts_of
from slipstream.run_folder import read_json, write_json
from slipstream.versions import installed, recorded_in

BASELINES = "baselines.json"
FINAL_BEST = "final_best.json"
FINAL_LAST = "final_last.json"
SUMMARY = "summary.json"
TIMES = "times.json"
_PACKAGES = ("slipstream", "torch", "numpy", "pyzmq", "transformers", "msgspec")


def write_summary(config: RunConfig, folder: Path, audited: Audit | None = None) -> dict[str, Any]:
    """Write summary.json and return it; `audited` saves another reading of the log.

    Keys ending in _seconds, `stage_seconds`, `learner_starved_share` and restarts depend on the clock and
    on what died; all others are equal for two serial runs of one configuration. Raises StorageError when
    the log is damaged.
    """
    summary = summarise(config, folder, audited)
    write_json(folder / SUMMARY, summary)
    return summary


def summarise(config: RunConfig, folder: Path, audited: Audit | None = None) -> dict[str, Any]:
    """Return the summary of the run in `folder`; raises StorageError when its log is damaged."""
    found, restarts = audited or audit(folder), restarts_of(folder)
    rows = read_rows(folder)
    train, status = rows_of(rows, "train"), read_json(folder / "status.json")
    books = dict(status.get("books", {}))
    seconds = read_json(folder / TIMES)
    return {
        **_successes(folder, rows),
        "baselines": read_json(folder / BASELINES),
        "wall_seconds": sum(seconds.values()),
        "stage_seconds": seconds,
        "steps": int(train[-1]["step"]) if train else 0,
        "trajectories": int(total(train, "trajectories")),
        "tokens_generated": int(train[-1].get("hub/tokens_received") or 0) if train else 0,
        "tokens_trained": int(total(train, "tokens/trained")),
        "slip_mean": weighted_mean(train, "slip/mean", "tokens/trained"),
        "slip_max": max((int(row.get("slip/max") or 0) for row in train), default=0),
        "dropped": int(books.get("dropped_by_slip", 0)),
        "lost": found.lost,
        "doubled": found.doubled,
        "restarts": sum(restarts.values()),
        "restarts_by_role": restarts,
        "learner_starved_share": weighted_mean(train, "wait/learner_starved", "seconds/step"),
        "seed": config.seed,
        "sampling": {
            "training": {"temperature": config.sampling.temperature, "top_p": 1.0},
            "evaluation": {"temperature": config.evaluation.temperature, "top_p": config.evaluation.top_p},
            "final_tasks": config.evaluation.final_tasks,
        },
        "books": books,
        "tool_cache_hits": weighted_mean(train, "tools/cached", "trajectories"),
        "versions": {**installed(_PACKAGES), **recorded_in(folder)},
        **_stages(train),
    }


def _stages(train: Sequence[Row]) -> dict[str, Any]:
    """Return a curriculum's stages as [step from which on, stage], or nothing without one."""
    staged = [
        (row["step"], row["curriculum/stage"]) for row in train if row.get("curriculum/stage") is not None
    ]
    changes = [after for before, after in pairwise([(0, -1.0), *staged]) if before[1] != after[1]]
    return {"stages": [[int(step), int(stage)] for step, stage in changes]} if staged else {}


def total(rows: Sequence[Row], name: str) -> float:
    """Return the sum of a metric over rows; rows without it count 0."""
    return float(sum(row.get(name) or 0 for row in rows))


def weighted_mean(rows: Sequence[Row], name: str, weight: str) -> float:
    """Return sum(weight x value) / sum(weight) over rows that hold both; 0 when none does."""
    pairs = [(row[weight], row[name]) for row in rows if row.get(name) is not None and row.get(weight)]
    mass = sum(share for share, _ in pairs)
    return sum(share * value for share, value in pairs) / mass if mass else 0.0


def _successes(folder: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the final success rates; the interval is that of the best checkpoint."""
    last = read_json(folder / FINAL_LAST)
    best = read_json(folder / FINAL_BEST) or last
    interval = None
    if best:
        tasks = int(best["tasks"])
        interval = list(wilson_interval(round(best["success"] * tasks), tasks))
    return {
        "success_warm_start": warm_start_success(folder, rows),
        "success_final": last.get("success"),
        "success_best": best.get("success"),
        "success_ci95": interval,
    }


def warm_start_success(folder: Path, rows: Sequence[Row]) -> float | None:
    """Return the warm start's held-out success: its baseline, or its last evaluation."""
    baseline = read_json(folder / BASELINES).get("warm_start")
    if isinstance(baseline, dict):
        return float(baseline["success"])
    checks = [row["success"] for row in rows_of(rows, "warmup") if row.get("success") is not None]
    return float(checks[-1]) if checks else None
