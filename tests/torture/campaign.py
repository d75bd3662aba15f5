"""The whole torture, for about an hour, or a share of it; writes one JSON file.

    python tests/torture/campaign.py [--scale 1.0] [--seed N] [--json FILE] [--go-on FILE]

Two processes share what there is to do. Every part is replayable by its name and seed: `again` in the
result is the command. A campaign that was cut off goes on from its result: what it has done counts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import quick
import zmq

import slipstream

SIGKILLS, NETWORK_FAULTS, RACES, STATES = 10_000, 20_000, 1_000, 1_000_000
"""What a campaign of scale 1 reaches."""
STEPS, INPUTS = 100_000_000, 20_000_000
"""Steps of the simulator and inputs of the fuzzer, likewise."""
SHARES = 20
"""Into how many parts these are cut."""
SEEDS_APART = 1_000_000
"""The simulator counts its runs up from a part's seed."""
VOLUME = {"simulator": ["simulator.py"], "fuzz": ["fuzz.py", "--workers", "1", "--finds", "runs/fuzz-finds"]}
LANES = 2


@dataclass(frozen=True, slots=True)
class Part:
    """One test with its seed."""

    name: str
    seed: int
    options: tuple[str, ...] = ()

    def command(self) -> str:
        """Return how to run it again."""
        program = VOLUME.get(self.name) or quick.COMMANDS.get(self.name, ["scenarios.py", self.name])
        return " ".join(
            ["python", f"tests/torture/{program[0]}", *program[1:], "--seed", str(self.seed), *self.options]
        )

    def start(self) -> subprocess.Popen[str]:
        """Start it; quick.finish waits for it."""
        if self.name not in VOLUME:
            return quick.start(self.name, seed=self.seed, options=self.options)
        command = [sys.executable, *self.command().split()[1:]]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@dataclass(kw_only=True)
class Total:
    """What all parts came to."""

    scale: float
    seed: int
    parts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    books: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    simulated: Counter[str] = field(default_factory=Counter)
    fuzzed: Counter[str] = field(default_factory=Counter)
    hangs: int = 0
    longest_settle_s: float = 0.0
    wrong: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, result: dict[str, Any]) -> Total:
        """Return what a result of `report` had come to."""
        known = {each.name: result[each.name] for each in fields(cls)}
        return cls(
            **{name: Counter(value) if isinstance(value, dict) else value for name, value in known.items()}
        )

    @property
    def network(self) -> int:
        """Faults of the network so far."""
        return sum(count for name, count in self.faults.items() if name.startswith("network_"))

    @property
    def sigkills(self) -> int:
        """Roles killed so far."""
        return self.faults["sigkill"] + self.faults["syscall_kill"]

    def take(self, part: Part, found: dict[str, Any]) -> None:
        """Add one part."""
        self.parts[part.name] += 1
        if part.name == "simulator":
            self.simulated.update({"runs": found["runs"], "steps": found["steps"]} | found["events"])
        elif part.name == "fuzz":
            self.fuzzed.update({"inputs": found["inputs"]} | found["of"])
        elif "faults" in found:
            self.faults.update(found["faults"])
            self.exits.update(found["exits"])
            self.books.update(found["books"])
            self.hangs += found["hangs"]
            self.longest_settle_s = max(self.longest_settle_s, found["settle_s"])
        elif "counts" in found:
            self.points.update(found["counts"])
        else:
            self.states.update({"states": found["states"], "different": found["different"]})
        wrong = next((found[key] for key in ("wrong", "failed", "finds") if key in found), [])
        if wrong:
            self.note(part, [str(one) for one in wrong[:10]])

    def note(self, part: Part, wrong: list[str]) -> None:
        """Keep what a part found wrong, and say it at once."""
        self.wrong.append({"again": part.command(), "wrong": wrong})
        sys.stderr.write(f"WRONG: {json.dumps(self.wrong[-1], indent=1)}\n")


def parts_of(total: Total) -> Iterator[Part]:
    """Yield what is to do until everything is reached."""
    seed, scale = total.seed, total.scale
    for number in range(max(1, round(3 * scale))):
        for name in quick.COMMANDS:
            if not name.startswith("power"):
                yield Part(name, seed + number)
    for name in ("calm", "silence"):
        yield Part(name, seed)
    yield Part("clones", seed, ("--races", str(max(6, round(RACES * scale)))))
    states = max(500, round(STATES * scale / 30))
    for number in range(10):
        for name in ("spool", "log", "checkpoint"):
            yield Part(f"power_of_the_{name}", seed + 1000 * number, ("--states", str(states)))
    number = 0
    while total.sigkills < SIGKILLS * scale or total.network < NETWORK_FAULTS * scale:
        number += 1
        durability = ("process", "power")[number % 2]
        yield Part("storm", seed + number, ("--seconds", "20", "--durability", durability))
        if number % 4 == 0:
            yield Part("weather", seed + number, ("--seconds", "20"))
        if number % 4 == 1:
            yield Part("disk_full", seed + number)
    for number in range(SHARES):
        share = max(1, round(STEPS * scale / SHARES)), max(1, round(INPUTS * scale / SHARES))
        yield Part("simulator", seed + number * SEEDS_APART, ("--steps", str(share[0])))
        yield Part("fuzz", seed + number, ("--inputs", str(share[1])))


def without(parts: Iterator[Part], done: Counter[str]) -> Iterator[Part]:
    """Yield the parts but the first `done[name]` of each name."""
    seen = Counter[str]()
    for part in parts:
        seen[part.name] += 1
        if seen[part.name] > done[part.name]:
            yield part


def run(total: Total, keep: Callable[[Total], None]) -> Total:
    """Run all that `total` has not come to, say how it goes, and keep what there is after each part."""
    todo = without(parts_of(total), Counter(total.parts))
    running = list[tuple[Part, Any, float]]()
    while True:
        while len(running) < LANES and (part := next(todo, None)) is not None:
            running.append((part, part.start(), time.monotonic()))
        if not running:
            return total
        for entry in list(running):
            part, process, since = entry
            longest_s = 3600.0 if part.options else quick.LONGEST_S * 2
            try:
                # Read meanwhile: a long report would not fit into the pipe.
                process.communicate(timeout=0.05)
            except subprocess.TimeoutExpired:
                if time.monotonic() - since < longest_s:
                    continue
            running.remove(entry)
            try:
                total.take(part, quick.finish(process, 10.0))
            except (AssertionError, ValueError, subprocess.TimeoutExpired) as error:
                total.note(part, [repr(error)[-3000:]])
            _say(total, part)
            keep(total)


def _say(total: Total, part: Part) -> None:
    sys.stderr.write(
        f"{time.strftime('%H:%M:%S')} {part.name} {part.seed}: {total.sigkills} kills, "
        f"{total.network} faults of the network, {sum(total.points.values())} points, "
        f"{total.states['states']} states, {total.simulated['steps']} steps, "
        f"{total.fuzzed['inputs']} inputs, {len(total.wrong)} wrong\n"
    )


def report(total: Total, started: datetime.datetime, seconds: float, *, whole: bool) -> str:
    """Return the result so far as JSON; `whole`: nothing is left to do."""
    result = {
        "date": started.isoformat(timespec="seconds"),
        "seconds": round(seconds),
        "whole": whole,
        "versions": {
            "slipstream": slipstream.__version__,
            "python": platform.python_version(),
            "pyzmq": zmq.__version__,
            "libzmq": zmq.zmq_version(),
            "kernel": platform.release(),
        },
        "sigkills": total.sigkills,
        "network_faults": total.network,
        "faults_per_second": round(sum(total.faults.values()) / seconds, 1),
        "lost": total.books["lost"],
        "doubled": sum("doubled" in line for entry in total.wrong for line in entry["wrong"]),
        **{
            name: dict(value) if isinstance(value, Counter) else value
            for name, value in total.__dict__.items()
        },
    }
    return json.dumps(result, indent=1) + "\n"


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--go-on", type=Path, metavar="FILE", help="the result of a campaign that was cut off"
    )
    options = parser.parse_args()
    started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
    total, seconds = Total(scale=options.scale, seed=options.seed), 0.0
    if options.go_on:
        before = json.loads(options.go_on.read_text())
        total, seconds = Total.of(before), before["seconds"]
        started = datetime.datetime.fromisoformat(before["date"])

    def keep(total: Total, whole: bool = False) -> None:
        text = report(total, started, seconds + time.monotonic() - clock, whole=whole)
        if options.json:
            # Whole at any time: a campaign that is cut off keeps what it has.
            options.json.parent.mkdir(parents=True, exist_ok=True)
            partial = options.json.with_suffix(".partial")
            partial.write_text(text)
            partial.replace(options.json)
        if whole:
            sys.stdout.write(text)

    run(total, keep)
    keep(total, whole=True)
    return 1 if total.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
