"""Benchmarks: what they read off a run, and a smoke of each through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from slipstream.metrics import FILE, append_row

BENCH = Path(__file__).parents[2] / "bench"
TINY = [
    "model.hidden_size=16",
    "model.intermediate_size=16",
    "model.layers=1",
    "model.heads=2",
    "batch.groups=2",
    "batch.group_size=2",
    "optim.minibatches=1",
    "warmup.batch=4",
    "warmup.max_steps=1",
    "warmup.min_success=0.0",
    "warmup.target_success=0.0",
    "evaluation.tasks=2",
    "environment.max_turns=2",
]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return import_module("_training_runs")


def plan(runs: ModuleType, work: Path, **changes: Any) -> Any:
    settings = {"target": 0.8, "window": 2, "latency_s": 0.05, "fresh_tasks": 4, "limit_s": 60.0}
    return runs.Plan(recipe="research", overrides=(), work=work, **{**settings, **changes})


def test_a_run_ends_at_the_first_window_that_reaches_the_target(runs: ModuleType, tmp_path: Path) -> None:
    for step, success in enumerate([0.5, 0.9, 0.6, 1.0, 1.0], start=1):
        append_row(tmp_path / FILE, {"kind": "train", "step": step, "success": success})
    append_row(tmp_path / FILE, {"kind": "evaluation", "step": 1, "success": 1.0})

    reached = {target: len(runs._until(tmp_path, plan(runs, tmp_path, target=target)))
               for target in (0.0, 0.7, 0.76, 0.8, 0.9, 1.0)}  # fmt: skip

    # Windows of two: 0.70, 0.75, 0.80, 1.00.
    assert reached == {0.0: 2, 0.7: 2, 0.76: 4, 0.8: 4, 0.9: 5, 1.0: 5}
    assert runs._until(tmp_path, plan(runs, tmp_path, target=1.0, window=3)) == []


def test_both_arms_share_every_setting_but_those_of_the_split(runs: ModuleType, tmp_path: Path) -> None:
    from slipstream.run_folder import first_difference

    sync = runs.Split(arm="sync", max_slip=0, actors=1, actor_threads=2, learner_threads=2, concurrency=128)
    swift = runs.Split(arm="async", max_slip=4, actors=2, actor_threads=1, learner_threads=1, concurrency=256)
    ours, theirs = (plan(runs, tmp_path).split_config(3, split) for split in (swift, sync))

    assert (ours.max_slip, ours.actor.count, ours.actor.concurrency, ours.learner.threads) == (4, 2, 256, 1)
    assert (theirs.max_slip, theirs.actor.threads, theirs.learner.threads) == (0, 2, 2)
    assert ours.environment.tool_latency_s == theirs.environment.tool_latency_s == 0.05
    same = {"max_slip": 0, "actor": theirs.actor, "learner": theirs.learner}
    assert first_difference(ours.model_copy(update=same), theirs) is None


def test_the_splits_swept_begin_with_one_of_each_arm(runs: ModuleType) -> None:
    splits = import_module("asynchrony").SPLITS

    assert [split.arm for split in splits] == ["sync", "async"] * (len(splits) // 2)
    assert {split.max_slip for split in splits if split.arm == "sync"} == {0}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_asynchrony_compares_real_runs(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    options = ["--rounds", "1", "--first-splits", "2", "--target", "0", "--window", "3", "--fresh-tasks", "4"]
    printed = bench("asynchrony", *options, "--output", str(output), *TINY)

    figures = json.loads(output.read_text())
    by_arm = {run["split"]["arm"]: run for run in figures["rounds"]}
    assert by_arm["sync"]["slip_max"] == 0
    assert by_arm["async"]["slip_max"] <= 4
    assert [run["steps"] for run in figures["rounds"] + figures["sweep"]] == [3] * 4
    assert figures["ratio"] == pytest.approx(by_arm["async"]["seconds"] / by_arm["sync"]["seconds"])
    form = figures["closed_form"]
    bound = max(form["T_gen_s"], form["T_train_s"]) + form["t_sync_s"]
    assert form["async_bound_s"] == pytest.approx(bound)
    assert f"ratio {figures['ratio']:.2f}" in printed


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_dataflow_measures_both_sides(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    bench("dataflow", "--rounds", "1", "--json", str(output))

    figures = json.loads(output.read_text())
    assert [row["size"] for row in figures["rows"]] == ["64 KB", "1 MB"]
    ways = {"slipstream", "power", "curve", "acked", "synced", "unacked"}
    assert all(row["mb_s"].keys() == ways and min(row["mb_s"].values()) > 0 for row in figures["rows"])
    assert figures["encode_32768_tokens_ms"] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_gateway_measures_both_servers(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    printed = bench("gateway", "--rounds", "1", "--agents", "2", "--turns", "2", "--json", str(output))
    figures = json.loads(output.read_text())
    assert all(
        figures[way]["calls_per_s"] > 0 and figures[way]["overhead_ms"] > 0 for way in ("plain", "gateway")
    )
    assert "wanted of the gateway: at most 6 ms, at least 250 calls/s; 2 agents at once" in printed


def bench(name: str, *options: str) -> str:
    """Run a benchmark as a user does; its output."""
    command = [sys.executable, "-m", "slipstream", "bench", name, "--", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_agents_are_measured_against_the_native_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(BENCH)
    agents = import_module("agents")
    for arm, success in (("native", 0.95), ("openai", 0.91)):
        (tmp_path / arm).mkdir()
        summary = {**dict.fromkeys(agents.TOLD, 0), "success_final": success}
        (tmp_path / arm / "summary.json").write_text(json.dumps(summary))
        for step in (0, 20):
            row = {"kind": "evaluation", "step": step, "success": success, "outcome/timed_out": 0.0}
            append_row(tmp_path / arm / FILE, row)
        agents.train(arm, tmp_path, None, [f"steps={20}"])

    found = agents.figures(tmp_path, ["native", "openai"])

    assert found["points_below_native"] == {"openai": pytest.approx(4.0)}
    assert found["runs"]["openai"]["curve"] == [[0, 0.91], [20, 0.91]]
