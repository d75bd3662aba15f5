"""A stand-in for all roles: does what plan.json beside the run folder says, with real files and signals."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

from slipstream import checkpoint
from slipstream.flight_recorder import FLIGHT, FOLDER
from slipstream.metrics import append_row
from slipstream.process import guard_parent
from slipstream.run_folder import write_json


def argument(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def mark(folder: Path) -> None:
    (folder / "x").write_text("x")


def wait_for_signal() -> None:
    while True:
        signal.pause()


def running(started: Path, role: str) -> list[str]:
    """Return who of a role has come to its work and is still there."""
    pids = [path.name.rpartition("-")[2] for path in started.glob(f"{role}-*")]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def wait_for_others(folder: Path, actors: int) -> None:
    """Wait until the hub does its work and the actor was started this often; the test holds the deadline."""
    ready = folder / "ready"
    while not (running(ready, "hub") and running(ready, "actor")) or starts(folder, "actor") < actors:
        time.sleep(0.02)


def starts(folder: Path, role: str) -> int:
    return len(list((folder / "pids").glob(f"{role}-*")))


def work(role: str, output: Path) -> None:
    """What a healthy role leaves behind."""
    if role == "eval":
        best = "best" in sys.argv[2]
        write_json(output, {"success": 0.9 if best else 0.8, "tasks": int(argument("--tasks"))})
    if role == "warmup":
        state = {"success": 0.4}
        checkpoint.publish(
            output / "checkpoints" / "warmup", lambda to: checkpoint.write_state(to / "state.json", state), {}
        )
        append_row(output / "metrics.jsonl", {"kind": "warmup", "step": 100, "success": 0.4})
        write_json(output / "baselines.json", {"do_nothing": {"success": 0.0, "source": "answers nothing"}})
    if role == "learner":
        for step in (1, 2):
            append_row(
                output / "metrics.jsonl",
                {"kind": "train", "step": step, "success": 0.5, "trajectories": 4,
                 "hub/tokens_received": 50.0 * step,
                 "tokens/trained": 10 * step, "slip/mean": float(step), "slip/max": step + 1,
                 "seconds/step": 1.0, "wait/learner_starved": 0.1 * step},
            )  # fmt: skip
        append_row(output / "metrics.jsonl", {"kind": "evaluation", "step": 2, "success": 0.7, "tasks": 64})
        checkpoints = output / "checkpoints"
        saved = checkpoint.save_checkpoint(checkpoints, 2, mark, keep=2)
        checkpoint.publish_folder(saved, checkpoints / "best")
    if role == "hub":
        write_json(output / "status.json", {"version": 2, "books": {"trained": 8, "dropped_by_slip": 3}})


def main() -> None:
    role, output = sys.argv[1], Path(argument("--output"))
    folder = (output.parent if role == "eval" else output).parent
    (folder / "pids").mkdir(exist_ok=True)
    (folder / "pids" / f"{role}-{os.getpid()}").write_text(os.environ["OMP_NUM_THREADS"])
    plan = json.loads((folder / "plan.json").read_text()).get(role, "work")
    if plan == "ignore SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if (role, plan) == ("hub", "work"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until it is waited for
    guard_parent(int(argument("--parent")), every_s=0.05)
    times = re.fullmatch(r"die (\d+) times", plan)
    if times:
        plan = "die" if starts(folder, role) <= int(times[1]) else "work"
    if plan == "work" and role == "learner":
        wanted = folder / "actors wanted"
        wait_for_others(folder, int(wanted.read_text()) if wanted.exists() else 1)
    if plan == "work":
        work(role, output)
    (folder / "ready").mkdir(exist_ok=True)
    (folder / "ready" / f"{role}-{os.getpid()}").touch()
    play(plan, role, folder)


def play(plan: str, role: str, folder: Path) -> None:
    """Stay or end as planned; whoever is ready acts on signals as planned, too."""
    match plan:
        case "work" if role == "hub":
            signal.sigwait({signal.SIGTERM})
            (folder / "outlived by").write_text(" ".join(running(folder / "pids", "actor")))
        case "work" if role == "actor":
            wait_for_signal()
        case "die":
            sys.stderr.write("first line\nthe disk is on fire\n")
            sys.exit(3)
        case "refuse":
            sys.stderr.write("noise\nslipstream: model.path: no such folder /models/none; give another\n")
            sys.exit(2)
        case "die when others are ready":
            while not (running(folder / "ready", "actor") and running(folder / "ready", "learner")):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill -9":
            os.kill(os.getpid(), signal.SIGKILL)
        case "wait" | "ignore SIGTERM":
            wait_for_signal()
        case "fall silent":
            FLIGHT.start(Path(argument("--output")) / FOLDER / f"{role}-0.ring")
            FLIGHT.note("the last thing it did")
            FLIGHT.waits("a word that never comes", 1.0)
            wait_for_signal()


main()
