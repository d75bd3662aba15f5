"""Unmodified agents of other frameworks, trained through the gateway, beside the environment's own loop.

    slipstream bench agents [-- --work DIR --warm-start DIR --arms NAME ... --json FILE key=value ...]

All arms train on the same tasks from one warm start, with the same settings but agent.program: `native` rolls
episodes out itself, `openai` and `pydantic-ai` are examples/*.py, which know only an address and a key. Runs
stand in --work, one folder an arm; what is there already is gone on with. The status is 1 when an agent ends
more than 5 points of final success (last checkpoint, fresh tasks) below the native path.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from _training_runs import PROGRAM, RunError, command

from slipstream.checkpoint import verify
from slipstream.config import load_config
from slipstream.errors import UserError
from slipstream.metrics import read_rows, rows_of
from slipstream.run_folder import read_json, write_config

EXAMPLES: Final = Path(__file__).resolve().parents[1] / "examples"
ARMS: Final = {
    "native": "",
    "openai": f"{EXAMPLES}/openai_agent.py:run",
    "pydantic-ai": f"{EXAMPLES}/pydantic_ai_agent.py:run",
}
PACKAGES: Final = ("slipstream", "torch", "openai", "pydantic-ai-slim", "starlette", "uvicorn")
MOST_POINTS: Final = 5.0
TOLD: Final = ("success_final", "success_best", "success_ci95", "steps", "trajectories", "wall_seconds")


def train(arm: str, work: Path, warm: Path | None, overrides: Sequence[str]) -> None:
    """Train an arm to its end, from a copy of the warm start; raises RunError."""
    folder = work / arm
    if not (folder / "config.toml").exists():
        write_config(folder, load_config("research", [*overrides, f"agent.program={ARMS[arm]}"]))
        if warm is not None:
            shutil.copytree(warm, folder / "checkpoints" / "warmup")
    if (folder / "summary.json").exists():
        return
    output = folder / "train.txt"
    with output.open("ab") as file:
        ended = subprocess.run(
            [*PROGRAM, "train", str(folder / "config.toml"), "--output", str(folder), "--resume",
             "--parent", str(os.getpid())],
            stdout=file, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if ended.returncode:
        last = output.read_text(errors="replace").strip()[-500:]
        raise RunError(f"{arm} ended with {ended.returncode}: {last}")


def warm_start(work: Path, overrides: Sequence[str]) -> Path:
    """Make the common warm start, unless it stands already, and return its policy folder."""
    folder = work / "warm"
    policy = folder / "checkpoints" / "warmup"
    if not policy.exists():
        write_config(folder, load_config("research", overrides))
        command([*PROGRAM, "warmup", "--output", str(folder)])
    verify(policy)
    return policy


def told(folder: Path) -> dict[str, Any]:
    """Return what a finished run says: its success over the steps, and at its end."""
    rows = rows_of(read_rows(folder), "evaluation")
    summary = read_json(folder / "summary.json")
    return {
        "curve": [[int(row["step"]), row["success"]] for row in rows],
        "timed_out": [row["outcome/timed_out"] for row in rows],
        **{name: summary[name] for name in TOLD},
    }


def figures(work: Path, arms: Sequence[str]) -> dict[str, Any]:
    """Return all arms, and how many points each agent ends below the native path."""
    runs = {arm: told(work / arm) for arm in arms}
    native = runs["native"]["success_final"]
    points = {arm: 100 * (native - run["success_final"]) for arm, run in runs.items() if arm != "native"}
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: _version(name) for name in PACKAGES},
        "runs": runs,
        "points_below_native": points,
        "wanted": {"points_below_native": MOST_POINTS},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _parser() -> argparse.ArgumentParser:
    about = "Agents of other frameworks through the gateway."
    parser = argparse.ArgumentParser(prog="slipstream bench agents --", description=about)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs")
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=list(ARMS))
    parser.add_argument("--work", type=Path, help="folder of the runs, kept; by default a temporary one")
    parser.add_argument("--warm-start", type=Path, help="policy folder, such as RUN/checkpoints/warmup")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print and write the figures; 1 when a run failed or an agent learned too little."""
    chosen = _parser().parse_intermixed_args(arguments)
    arms = list(dict.fromkeys(["native", *chosen.arms]))
    with tempfile.TemporaryDirectory(prefix="agents-") as temporary:
        work = chosen.work or Path(temporary)
        try:
            warm = chosen.warm_start or warm_start(work, chosen.overrides)
            for arm in arms:
                train(arm, work, warm, chosen.overrides)
            found = figures(work, arms)
        except (RunError, UserError) as error:
            sys.stderr.write(f"agents: {error}\n")
            return UserError.exit_code if isinstance(error, UserError) else 1
    for arm, run in found["runs"].items():
        sys.stdout.write(f"{arm:<12} {run['success_final']:.3f} after {run['wall_seconds']:.0f} s\n")
    if chosen.json is not None:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(points > MOST_POINTS for points in found["points_below_native"].values()))


if __name__ == "__main__":
    sys.exit(main())
