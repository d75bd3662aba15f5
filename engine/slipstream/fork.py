"""Floor 4. A run that begins with another's policy, under changed settings.

    RUN@step  ──▶ checkpoints/warmup of the new run: its warm start, and what its KL penalty holds it to
    RUN's config.toml, and the settings that differ  ──▶ config.toml of the new run
    fork.json: where it came from, by checksum, and what was changed

Optimizer, log and versions of the old run stay behind. What makes the policy what it is (its sizes, its
folder, how it writes calls) cannot change, and a warm start is not made again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from slipstream import checkpoint, plain_json, run_folder
from slipstream import config as configuration
from slipstream.config import RunConfig
from slipstream.errors import CheckpointError, ConfigurationError
from slipstream.metrics import read_rows, rows_of

FILE: Final = "fork.json"
NAMED: Final = ("best", "warmup")
"""Checkpoints that are called by a name and not by their step."""
LEFT_BEHIND: Final = frozenset(
    {checkpoint.MANIFEST, "optimizer.safetensors", "random.safetensors", "state.json"}
)
"""Files of a checkpoint that belong to its run and not to the policy."""
_FROZEN: Final = {
    "model.path": "the policy is that of the checkpoint",
    "model.hidden_size": "the policy has its size",
    "model.intermediate_size": "the policy has its size",
    "model.layers": "the policy has its size",
    "model.heads": "the policy has its size",
    "model.call_format": "the policy has learnt how to write calls",
}

_MEANING: Final = ("environment.", "agent.", "evaluation.temperature", "evaluation.top_p")
"""Settings with which success means something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """Where a new run begins."""

    run: Path
    source: Path
    """The checkpoint's folder."""
    step: int
    """Optimizer steps of `run` that made it; 0: its warm start."""
    changed: Mapping[str, Any]
    """Dotted keys that differ, with their new values."""
    same_tasks: bool
    """Whether success means in both runs the same."""


def planned(origin: str, overrides: Sequence[str]) -> tuple[RunConfig, Fork]:
    """Return the configuration of a fork of "RUN" or "RUN@step", and what it begins with.

    A step is a number, "best" or "warmup"; without one it is the newest checkpoint. Raises RunFolderError,
    CheckpointError, and ConfigurationError for a setting that a fork cannot change.
    """
    place, at, step = origin.rpartition("@")
    run = Path(place if at else origin).resolve()
    before = run_folder.read_config(run)
    config = configuration.load_config(run / run_folder.CONFIG, overrides)
    changed = run_folder.differences(before, config)
    for key in changed:
        if key in _FROZEN:
            raise ConfigurationError(
                f"--fork: {key} cannot change, since {_FROZEN[key]}; leave it out, or train anew without "
                "--fork"
            )
        if key.startswith("warmup."):
            raise ConfigurationError(
                f"--fork: {key} would change nothing, since the warm start is that checkpoint; leave it out"
            )
    source, number = _checkpoint(run, step if at else "")
    _check_length(source, config)
    same = not any(key.startswith(_MEANING) for key in changed)
    return config, Fork(run=run, source=source, step=number, changed=changed, same_tasks=same)


def begin(fork: Fork, folder: Path) -> None:
    """Give a new run folder its warm start, and write down where it came from; raises CheckpointError."""
    before = checkpoint.verify(fork.source)["files"]
    kept = sorted(before.keys() - LEFT_BEHIND)

    # First: without it, whoever resumes after a crash would make a warm start of its own.
    run_folder.write_json(
        folder / FILE,
        {
            "run": str(fork.run),
            "run_id": run_folder.read_json(fork.run / "run.json").get("run"),
            "checkpoint": fork.source.name,
            "step": fork.step,
            "sha256": {name: before[name]["sha256"] for name in kept},
            "changed": dict(fork.changed),
        },
    )

    def copy(into: Path) -> None:
        for name in kept:
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fork.source / name, into / name)

    notes: dict[str, Any] = {"step": 0, "fork": {"run": str(fork.run), "step": fork.step}}
    success = _success(fork) if fork.same_tasks else None
    if success is not None:
        notes["success"] = success
        told = {"success": success, "source": f"{fork.run.name}, step {fork.step}"}
        run_folder.write_json(folder / "baselines.json", {**_baselines(fork), "warm_start": told})
    target = folder / "checkpoints" / "warmup"
    target.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.publish(target, copy, notes)
    after = checkpoint.read_manifest(target)["files"]
    for name in kept:
        if after[name]["sha256"] != before[name]["sha256"]:
            raise CheckpointError(f"{fork.source / name} changed while it was copied; try again")


def check_begun(folder: Path) -> None:
    """Raise CheckpointError for a fork whose warm start is missing or damaged: none is made in its place."""
    origin = run_folder.read_json(folder / FILE)
    if origin:
        raise CheckpointError(
            f"{folder} is a fork of {origin.get('run')}, and its warm start is not whole; remove it and fork "
            "again"
        )


def _checkpoint(run: Path, step: str) -> tuple[Path, int]:
    """Return a verified checkpoint of a run, and its step."""
    folder = run / "checkpoints"
    if not step:
        found = checkpoint.load_latest(folder)
        return found.path, found.step
    path = folder / step
    if step not in NAMED:
        steps = checkpoint.steps_in(folder)
        if not step.isdecimal() or int(step) not in steps:
            there = ", ".join([*map(str, steps), *(name for name in NAMED if (folder / name).is_dir())])
            raise CheckpointError(
                f"--fork: {run} has no checkpoint {step}; give @ and one of {there or 'none'}"
            )
        path = folder / f"step-{int(step):08d}"
    manifest = checkpoint.verify(path)
    return path, 0 if step == "warmup" else int(manifest.get("step", 0))


def _check_length(source: Path, config: RunConfig) -> None:
    """Refuse episodes longer than the policy has positions for."""
    try:
        most = plain_json.read(source / "config.json").get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        raise CheckpointError(f"{source / 'config.json'}: expected a model's configuration") from None
    longest = config.environment.max_tokens
    if isinstance(most, int) and longest > most:
        raise ConfigurationError(
            f"--fork: environment.max_tokens must be at most {most}, the positions of that policy, got "
            f"{longest}"
        )


def _success(fork: Fork) -> float | None:
    """Return the held-out success that the old run measured at that step."""
    rows = read_rows(fork.run)
    measured = rows_of(rows, "evaluation") if fork.step else rows_of(rows, "warmup")
    found = [
        float(row["success"])
        for row in measured
        if row.get("success") is not None and (not fork.step or row["step"] == fork.step)
    ]
    return found[-1] if found else None


def _baselines(fork: Fork) -> dict[str, Any]:
    return run_folder.read_json(fork.run / "baselines.json")
