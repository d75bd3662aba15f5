"""Floor 4. What a run looks like right now, read from its folder alone.

`status.json` is the hub's, written about twice a second; all its keys are optional:

    version                  optimizer steps done
    books                    {"made": 512, "trained": 384, ...}
    learner_waits            {"batch": 7, "seconds": 0.8}, or null
    actors_blocked_by_gate   ["actor-0"]
    actors                   {"actor-0": {"leased": 128, "silent_s": 0.1, ...}}
    success                  [{"step": 25, "success": 0.61, ...}], the held-out evaluations
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipstream.config import RunConfig
from slipstream.metrics import Row, read_rows, rows_of
from slipstream.run_folder import read_json

WINDOW = 20
"""Train rows that rates and running means look back over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One reading of a run folder; None where nothing is known yet."""

    stage: str
    step: int
    steps: int
    left_s: float | None
    """Seconds to the last step at the rate of the last WINDOW rows."""
    evaluations: Sequence[tuple[int, float]]
    """(step, held-out success) in order, the warm start at step 0."""
    success: float | None
    """Training success, mean of the last WINDOW rows."""
    reward: float | None
    slip: float | None
    slip_histogram: Sequence[int]
    """Trained tokens by slip over the last WINDOW rows."""
    generated_per_s: float | None
    trained_per_s: float | None
    starved: float | None
    cached: float | None
    """Share of tool calls that the tool cache answered, likewise; None without a cache."""
    waiting: Sequence[str]
    actors: Sequence[str]
    books: Mapping[str, int]


def take_snapshot(config: RunConfig, folder: Path, stage: str) -> Snapshot:
    """Read the folder of a run that is in `stage`."""
    rows, status = read_rows(folder), read_json(folder / "status.json")
    warming = stage == "warm start"
    recent = rows_of(rows, "warmup" if warming else "train")[-WINDOW:]
    steps = config.warmup.max_steps if warming else config.steps
    step = int(recent[-1]["step"]) if recent else 0
    if not warming:
        step = max(step, int(status.get("version") or 0))
    return Snapshot(
        stage=stage,
        step=step,
        steps=steps,
        left_s=_seconds_left(recent, steps - step),
        evaluations=_evaluations(rows, status),
        success=_mean(recent, "success"),
        reward=_mean(recent, "reward"),
        slip=_mean(recent, "slip/mean"),
        slip_histogram=_summed(recent),
        generated_per_s=_mean(recent, "actors/tokens_per_s"),
        trained_per_s=_mean(recent, "tokens/trained_per_s"),
        starved=_mean(recent, "wait/learner_starved"),
        cached=None if config.environment.tool_cache == "off" else _mean(recent, "tools/cached"),
        waiting=waits_of(status),
        actors=actors_of(status),
        books=status.get("books", {}),
    )


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None


def _summed(rows: Sequence[Row]) -> list[int]:
    histograms = [row.get("slip/histogram") or [] for row in rows]
    longest = max(map(len, histograms), default=0)
    return [sum(counts[i] for counts in histograms if i < len(counts)) for i in range(longest)]


def _seconds_left(rows: Sequence[Row], steps: int) -> float | None:
    if len(rows) < 2:
        return None
    done, spent = rows[-1]["step"] - rows[0]["step"], rows[-1]["time"] - rows[0]["time"]
    return max(0.0, steps * spent / done) if done > 0 and spent > 0 else None


def _evaluations(rows: Sequence[Row], status: Mapping[str, Any]) -> list[tuple[int, float]]:
    warm = [row["success"] for row in rows_of(rows, "warmup") if row.get("success") is not None]
    held_out = {0: float(warm[-1])} if warm else {}
    for row in [*status.get("success", []), *rows_of(rows, "evaluation")]:
        if row.get("success") is not None:
            held_out[int(row["step"])] = float(row["success"])
    return sorted(held_out.items())


def waits_of(status: Mapping[str, Any]) -> list[str]:
    """Say who waits for whom, as the hub's status has it."""
    lines: list[str] = []
    if learner := status.get("learner_waits"):
        lines.append(f"learner waits for batch {learner['batch']} since {learner['seconds']:.1f} s")
    blocked = status.get("actors_blocked_by_gate", [])
    return lines + [f"{name} waits for the learner: max_slip allows no new episodes" for name in blocked]


def actors_of(status: Mapping[str, Any]) -> list[str]:
    """Return one line per actor of the hub's status, and per role that serves."""
    return [
        f"{name}  {_business(actor)}, heard {actor.get('silent_s', 0.0):.1f} s ago"
        for name, actor in sorted(status.get("actors", {}).items())
    ]


def _business(actor: Mapping[str, Any]) -> str:
    servers = actor.get("counters", {}).get("servers")
    return f"{actor.get('leased', 0)} episodes" if servers is None else f"{servers:.0f} servers up"
