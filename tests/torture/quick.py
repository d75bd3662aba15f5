"""The quick tests of the rig by name, each in a process of its own that has imported no torch.

python tests/torture/quick.py NAME [--bug NAME] [--seed N]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import shim

HERE = Path(__file__).parent
LONGEST_S = 300.0
"""Far above what any of them takes: it only ends what hangs."""
COMMANDS: dict[str, list[str]] = {
    "points_of_the_spool": ["points.py", "spool", "--only", "kills"],
    "points_of_the_log": ["points.py", "log", "--only", "kills"],
    "points_of_the_checkpoint": ["points.py", "checkpoint", "--only", "kills"],
    "failures_of_the_spool": ["points.py", "spool", "--only", "failures"],
    "failures_of_the_log": ["points.py", "log", "--only", "failures"],
    "failures_of_the_checkpoint": ["points.py", "checkpoint", "--only", "failures"],
    "power_of_the_spool": ["power.py", "spool", "--states", "3000"],
    "power_of_the_log": ["power.py", "log", "--states", "3000"],
    "power_of_the_checkpoint": ["power.py", "checkpoint", "--states", "3000"],
}


def start(name: str, *, seed: int, bug: str = "", options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start a quick test; scenarios.py has the others."""
    command = COMMANDS.get(name, ["scenarios.py", name])
    if bug and name not in COMMANDS:
        options = ("--patience", "0.5", *options)
    return subprocess.Popen(
        [sys.executable, str(HERE / command[0]), *command[1:], "--seed", str(seed), "--bug", bug, *options],
        env={**os.environ, **_preload(), "PYTHONPATH": os.pathsep.join(sys.path[:1] + _packages())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], longest_s: float = LONGEST_S) -> dict[str, Any]:
    """Return what a quick test found; raises AssertionError when it died or did not end."""
    try:
        out, errors = process.communicate(timeout=longest_s)
    finally:
        process.kill()
        process.wait(LONGEST_S)
    assert out, f"{process.args} ended with {process.returncode}: {errors[-3000:]}"
    return dict(json.loads(out))


def run(name: str, *, seed: int, bug: str = "", options: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run a quick test to its end."""
    return finish(start(name, seed=seed, bug=bug, options=options))


def needs_shim(name: str) -> bool:
    """Return whether a test is nothing without the shim."""
    return name in COMMANDS


def _packages() -> list[str]:
    root = HERE.parent.parent
    return [str(root / "engine"), str(root / "kernels")]


def _preload() -> dict[str, str]:
    try:
        return shim.prepare()
    except shim.MissingShimError:
        return {}


if __name__ == "__main__":
    arguments = sys.argv[1:]
    chosen = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    result = run(arguments[0], seed=int(chosen.get("--seed", "0")), bug=chosen.get("--bug", ""))
    print(json.dumps(result, indent=1))
    sys.exit(bool(result["wrong"]))
