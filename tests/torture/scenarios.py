"""Runs of the rig by name, each with the faults that one kind of bug does not survive.

python tests/torture/scenarios.py storm [--seed N] [--seconds S] [--bug NAME] [--disk FOLDER] [--keep]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import roles
import shim
from rig import Outcome, Plan, Rig, Role, torture

CALM = Plan(seed=0, seconds=2.0, kill_every_s=1e9, network_rate=0.0, armed_share=0.0)


class Clones(Rig):
    """Two processes take one name, again and again: one of them must be refused."""

    def play(self, until: float) -> None:
        """Let pairs compete."""
        pair = [self.actor("c", "c0"), self.actor("c", "c1")]
        self.late = [self.actor("c", "c0"), self.actor("c", "c1")]
        for number in range(self.plan.races):
            self.outcome.faults["races"] += 1
            first, second = pair if self.random.random() < 0.5 else pair[::-1]
            self._start_clone(first)
            self._pass(time.monotonic() + self.random.uniform(0.0, 0.15))
            self._start_clone(second)
            if not self._one_is_refused(pair):
                self.outcome.wrong.append(f"race {number}: neither of two clones was refused")
            for role in pair:
                if role.pid:
                    os.kill(role.pid, signal.SIGKILL)
                    os.waitpid(role.pid, 0)
                    role.pid = 0

    def _start_clone(self, role: Role) -> None:
        role.pid = self._fork(role.name, role.work)

    def _one_is_refused(self, pair: list[Role]) -> bool:
        end = time.monotonic() + 2 * roles.LONGEST_S * self.plan.patience
        while time.monotonic() < end:
            self._pass(time.monotonic() + 0.01)
            for role in pair:
                pid, status = os.waitpid(role.pid, os.WNOHANG)
                if pid:
                    role.pid = 0
                    self.outcome.exits[f"clone {os.waitstatus_to_exitcode(status)}"] += 1
                    return os.waitstatus_to_exitcode(status) == roles.EXITS[roles.RefusedError]
        return False

    def _pass(self, until: float) -> None:
        while (now := time.monotonic()) < until:
            self.turn(now)
            self.rest(until)


class Silence(Rig):
    """The hub stands still: everybody who waits for it must say so in time, and end."""

    def play(self, until: float) -> None:
        """Stop the hub for ever."""
        while (now := time.monotonic()) < until:
            self.turn(now)
            self.rest(until)
        hub, *others = self.roles
        os.kill(hub.pid, signal.SIGSTOP)
        self.outcome.faults["sigstop"] += 1
        waiting = {role.name: role for role in others}
        end = time.monotonic() + 2 * self.plan.patience * roles.LONGEST_S
        while waiting and time.monotonic() < end:
            for role in list(waiting.values()):
                pid, status = os.waitpid(role.pid, os.WNOHANG)
                if pid:
                    role.pid = 0
                    del waiting[role.name]
                    self.outcome.exits[f"{role.name} {os.waitstatus_to_exitcode(status)}"] += 1
            self.rest(time.monotonic() + 0.05)
        if waiting:
            self.outcome.hangs += len(waiting)
            self.outcome.wrong.append(f"hang: {sorted(waiting)} wait for a hub that stands still")
            for role in waiting.values():
                self._kill(role)
        self._kill(hub)


SCENARIOS: dict[str, tuple[type[Rig], Plan]] = {
    "calm": (Rig, dataclasses.replace(CALM, exits=(), odd_share=0.1)),
    "hub_kills": (
        Rig,
        dataclasses.replace(
            CALM,
            seconds=5.0,
            kill_every_s=0.25,
            weights=(1, 0, 0),
            armed_share=0.4,
            armed_roles=("hub",),
            least=200,
        ),
    ),
    "learner_kills": (
        Rig,
        dataclasses.replace(CALM, seconds=4.0, kill_every_s=0.3, weights=(0, 1, 0), exits=()),
    ),
    "actor_kills": (
        Rig,
        dataclasses.replace(
            CALM, seconds=3.0, kill_every_s=0.1, weights=(0, 0, 1), odd_share=0.12, exits=(), least=30
        ),
    ),
    "cuts": (
        Rig,
        dataclasses.replace(CALM, seconds=4.0, network_rate=12.0, network_faults=("cut",), exits=()),
    ),
    "flips": (
        Rig,
        dataclasses.replace(CALM, seconds=5.0, network_rate=8.0, network_faults=("flip",), least=150),
    ),
    "clones": (Clones, dataclasses.replace(CALM, races=6)),
    "silence": (Silence, dataclasses.replace(CALM, seconds=1.0)),
    "weather": (
        Rig,
        dataclasses.replace(
            CALM, seconds=10.0, network_rate=60.0, network_faults=("delay", "duplicate", "cut")
        ),
    ),
    "disk_full": (Rig, Plan(seed=0, seconds=10.0, fill=True, network_rate=0.0, armed_share=0.0)),
    "storm": (Rig, Plan(seed=0, seconds=15.0, least=20)),
}


def play(name: str, **changes: object) -> Outcome:
    """Run a scenario, with some of its plan changed."""
    kind, plan = SCENARIOS[name]
    return torture(dataclasses.replace(plan, **changes), kind)  # type: ignore[arg-type]


def on_a_small_disk() -> None:
    """Start this program again with 48 MB of memory as its disk, in a mount namespace of its own.

    Several times what a run of this length writes: log segments are kept for the checker, and a disk that the
    run itself has filled would never have room again.
    """
    folder = tempfile.mkdtemp(prefix="slipstream-disk-")
    mount = 'mount -t tmpfs -o size=48m none "$0" && exec "$@"'
    program = [sys.executable, *sys.orig_argv[1:], "--disk", folder]
    os.execvp("unshare", ["unshare", "-rm", "sh", "-c", mount, folder, *program])


def main() -> int:
    """Run from the command line."""
    shim.load_into_this_program()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(SCENARIOS))
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--patience", type=float)
    parser.add_argument("--races", type=int)
    parser.add_argument("--faults", type=int)
    parser.add_argument("--durability", choices=("process", "power"))
    parser.add_argument("--bug")
    parser.add_argument("--disk", type=Path)
    parser.add_argument("--keep", action="store_true", default=None)
    options = vars(parser.parse_args())
    if options["name"] == "disk_full" and options["disk"] is None:
        on_a_small_disk()
    outcome = play(options.pop("name"), **{key: value for key, value in options.items() if value is not None})
    print(json.dumps(outcome.as_json(), indent=1))
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
