"""Floor 1. The one place of metrics: their names and definitions, rows on disk, and statistics.

A row is one JSON object per line of `metrics.jsonl`. Every row holds `kind` ("train", "evaluation" or
"warmup"), `step` and `time` (seconds since the epoch); all other names are those of DEFINITIONS.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from slipstream import plain_json

Row = dict[str, Any]

FILE = "metrics.jsonl"

DEFINITIONS: Mapping[str, str] = MappingProxyType(
    {
        "kind": 'What the row is about: "train", "evaluation" or "warmup".',
        "step": "Optimizer steps done (train, warmup) or that made the evaluated weights (evaluation).",
        "time": "When the row was written, seconds since the epoch.",
        "loss": "The step's scalar loss.",
        "loss/*": "One part of the loss: surrogate, kl or entropy.",
        "ratio/mean": "Mean raw current/behavior ratio.",
        "importance/*": "Corrected proximal/behavior ratio: its mean, and the shares capped and rejected.",
        "success": "Share of trajectories whose every outcome score is positive; held-out in evaluations.",
        "tasks": "Evaluated tasks.",
        "successes": "Evaluated tasks that succeeded.",
        "best": "True when this evaluation is the best so far.",
        "paired/*": "Success minus that of the best before, on the same tasks; low and high: 95 % bootstrap.",
        "serial": "Serial of the weights the row is about.",
        "reward": "Mean reward of the step's trajectories, penalties and shaping included.",
        "reward/*": "Mean weight x value of one reward component, before the cap.",
        "turns": "Mean assistant turns of a trajectory.",
        "length": "Mean tokens of a trajectory, prompt and observations included.",
        "outcome/*": "Share of trajectories that ended this way.",
        "tools/success": "Share of executed tool calls with status ok.",
        "tools/cached": "Share of executed tool calls whose result came out of the tool cache.",
        "tools/valid": "Share of assistant messages that were well-formed tool calls.",
        "monitor/*": "Signs of a degenerate policy (monitors.py); alarms: how many are above their limit.",
        "monitor/verifier_gap": "Mean success minus the mean of the held-out verifier, where both are known.",
        "monitor/heldout_gap": "Mean success of the last batches minus that of the evaluation.",
        "tools/crashed": "Share of executed tool calls in which the tool itself failed.",
        "tools/cut": "Share of executed tool calls whose result was longer than it may be.",
        "metric/*": "Mean of a metric of the environment's author.",
        "fired/*": "Share of trajectories in which that monitor of the environment's author fired.",
        "invalid/*": "Share of trajectories in which that score could not be judged.",
        "screened": "Share of trajectories whose outcome could not be judged: they are not trained.",
        "groups/zero_variance": "Share of groups whose rewards are all equal.",
        "curriculum/stage": "Stage of the next group, counted from 0; the number of stages: the real task.",
        "curriculum/success": "(successes + 1) / (episodes + 2) of the stage, older episodes fading.",
        "curriculum/alike": "Share of groups that tell nothing, filtered ones too, over the last batches.",
        "curriculum/temperature": "What the next group is sampled at.",
        "curriculum/group_size": "Episodes of the next group.",
        "slip/mean": "Learner step minus version of a token, mean over trained tokens at consumption.",
        "slip/p95": "95th percentile of the same.",
        "slip/max": "Largest of the same.",
        "slip/histogram": "Trained tokens by slip: entry i counts the tokens of slip i.",
        "slip/seconds_mean": "Seconds from a token's episode end to its consumption, mean over tokens.",
        "slip/seconds_p95": "95th percentile of the same.",
        "slip/seconds_max": "Largest of the same.",
        "slip/in_flight_mean": "The part of slip/mean gathered before the trajectory was complete.",
        "slip/in_queue_mean": "The part of slip/mean gathered after the trajectory was complete.",
        "ratio/ess": "Effective sample size (sum r)^2 / (n sum r^2) of raw current/behavior ratios r.",
        "ratio/max": "Largest raw current/behavior ratio.",
        "ratio/min": "Least raw current/behavior ratio.",
        "mismatch/k1": "Mean of log behavior - log proximal over tokens: KL(behavior || proximal), k1.",
        "mismatch/k2": "Mean of (log r)^2 / 2, r as in mismatch/k3: KL(behavior || proximal), k2.",
        "mismatch/k3": "Mean of r - 1 - log r, r = proximal / behavior: KL(behavior || proximal), k3.",
        "proximal/*": "k1, k2 and k3 of the current policy towards the proximal one, on sampled tokens.",
        "reference/*": "k1 and k3 estimates of KL(current || warm start), on sampled tokens.",
        "kl/reference": "Mean k2 estimate (log current - log reference)^2 / 2 towards the warm start.",
        "kl/exploration": "Mean log(behavior / warm start at sampling.temperature), where it was warmer.",
        "clip/positive": "Share of tokens with positive advantage whose gradient the clip removed.",
        "clip/negative": "Share of tokens with negative advantage whose gradient the clip removed.",
        "clip/dual": "Share of tokens with negative advantage whose gradient the dual clip removed.",
        "advantage/*": "Mean advantage of trained tokens of that sign.",
        "masked": "Share of policy tokens without gradient (over-age, trust region, quarantine).",
        "masked/over_age": "Share of policy tokens masked because their slip exceeds max_slip.",
        "masked/trust": "Share of policy tokens that would be carried further out of the trust region.",
        "entropy": "Mean entropy of the tempered policy at trained tokens, nats.",
        "grad_norm": "Global gradient norm before clipping.",
        "learning_rate": "Learning rate of the step.",
        "skipped": "Optimizer updates left out for non-finite or spiking values so far.",
        "skipped/*": "Updates this step left out: for values of its batch, or for its loss or gradient.",
        "trajectories": "Trajectories the step consumed.",
        "tokens": "Mean sampled tokens of a trajectory.",
        "tokens/trained": "Policy tokens in the step's loss.",
        "tokens/trained_per_s": "tokens/trained over the seconds since the last train row.",
        "tokens/useful_per_s": "Trained tokens with a gradient over the same seconds.",
        "seconds/step": "Wall-clock seconds since the last train row.",
        "wait/learner_starved": "Share of seconds/step the learner waited for a batch.",
        "wait/actors_blocked": "Share of seconds/step actors waited for a lease or for credit, mean.",
        "hub/*": "The hub's books when the row was written: trajectories by fate.",
        "actors/*": "An actor's counter when the row was written, summed over actors.",
        "mfu": "Model FLOPs utilisation, only with a GPU.",
        "sync/bytes": "Bytes of one weight publication.",
        "sync/seconds": "Seconds from publication to the last actor's proof.",
    }
)
"""Every metric with its definition; a name ending in * stands for a family."""


def undefined_names(row: Mapping[str, Any]) -> list[str]:
    """Return the row's names that DEFINITIONS does not know."""
    return [name for name in row if name not in DEFINITIONS and f"{name.split('/')[0]}/*" not in DEFINITIONS]


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row with a single write; non-finite numbers become null.

    `time`, in seconds since 1970, is added. A line torn by a crash before is closed first, so that it
    cannot swallow this row.
    """
    stamped = {"time": time.time(), **row}
    line = json.dumps({name: _plain(value) for name, value in stamped.items()}, allow_nan=False) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, (("\n" if torn else "") + line).encode())
    finally:
        os.close(descriptor)


def read_rows(folder: Path) -> list[Row]:
    """Return the rows of a run in the order of their steps, each step and kind once.

    After a resume steps repeat: the later row counts. Torn lines are left out.
    """
    path = folder / FILE
    rows: dict[tuple[str, int], Row] = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = plain_json.parse(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int | float) and math.isfinite(row["step"]):
            rows[str(row.get("kind", "train")), int(row["step"])] = row
    return sorted(rows.values(), key=lambda row: int(row["step"]))


def rows_of(rows: Sequence[Row], kind: str) -> list[Row]:
    """Return the rows of one kind, in order."""
    return [row for row in rows if row.get("kind", "train") == kind]


def slip_statistics(slips: ArrayLike, seconds: ArrayLike) -> Row:
    """Return the slip metrics of one step.

    `slips` [N] integers, versions per trained token at consumption; `seconds` [N], their age.
    Percentiles are nearest rank: the least value that at least 95 % of tokens do not exceed.
    """
    slip_N, seconds_N = np.asarray(slips, dtype=np.int64), np.asarray(seconds, dtype=np.float64)
    if not slip_N.size:
        return {"slip/histogram": []}
    row: Row = {"slip/histogram": np.bincount(np.maximum(slip_N, 0)).tolist()}
    for prefix, values in (("slip/", slip_N), ("slip/seconds_", seconds_N)):
        if values.size:
            row[f"{prefix}mean"] = float(values.mean())
            row[f"{prefix}p95"] = float(np.percentile(values, 95, method="inverted_cdf"))
            row[f"{prefix}max"] = float(values.max())
    row["slip/max"] = int(slip_N.max())
    return row


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a success rate after `n` trials.

        (p + z^2/2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2/n)

    Source: Wilson 1927, Journal of the American Statistical Association 22, p. 209.
    """
    if n <= 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def _plain(value: Any) -> Any:
    """Return what JSON can hold: numpy scalars and arrays as numbers and lists, NaN as None."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
