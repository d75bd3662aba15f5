"""A stand-in for all roles: does what plan.json beside the run folder says, with real files and signals."""

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

from slipstream import checkpoint
from slipstream.flight_recorder import FLIGHT, FOLDER, read_flight
from slipstream.metrics import append_row
from slipstream.process import guard_parent
from slipstream.rendezvous import announce_address
from slipstream.run_folder import write_json
from slipstream.stop_signals import STOPPED


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


def wait_for_others(folder: Path) -> None:
    """Wait until hub and actor work and were started as often as the test wants; it holds the deadline."""
    path = folder / "wanted.json"
    wanted = json.loads(path.read_text()) if path.exists() else {}
    for role in ("hub", "actor"):
        while starts(folder, role) < wanted.get(role, 1) or not running(folder / "ready", role):
            time.sleep(0.02)


def beat() -> None:
    while True:
        FLIGHT.beat()
        time.sleep(0.05)


def record(role: str, output: Path, *, alive: bool) -> None:
    """Record a flight as a role does, and show signs of life."""
    ring = Path(argument("--flight")) if role == "eval" else output / FOLDER / f"{role}-0.ring"
    FLIGHT.start(ring)
    if alive:
        threading.Thread(target=beat, daemon=True).start()


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
    # Of the two evaluations that run at once, one is counted under a name of its own.
    known = "evalbest" if role == "eval" and "best" in sys.argv[2] else role
    (folder / "pids" / f"{known}-{os.getpid()}").write_text(os.environ["OMP_NUM_THREADS"])
    plan = json.loads((folder / "plan.json").read_text()).get(role, "work")
    if plan == "ignore SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if (role, plan) == ("hub", "work"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until it is waited for
    guard_parent(int(argument("--parent")), every_s=0.05)
    times = re.fullmatch(r"(.*) (\d+) times", plan)
    if times and known != role:
        plan = "work"
    elif times:
        plan = times[1] if starts(folder, role) <= int(times[2]) else "work"
    record(role, output, alive=plan != "fall silent")
    if plan == "work" and role == "learner":
        wait_for_others(folder)
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
            sys.exit(4)
        case "end":
            pass
        case "be asked to stop":
            sys.exit(STOPPED)
        case "find no numbers":
            sys.stderr.write("slipstream: loss was not finite 5 steps in a row\n")
            sys.exit(3)
        case "die when the actor has ended":
            while not (starts(folder, "actor") and not running(folder / "pids", "actor")):
                time.sleep(0.02)
            sys.exit(4)
        case "end when the learner is there again":
            while starts(folder, "learner") < 2:
                time.sleep(0.02)
        case "give a silent hub up":
            ring = Path(argument("--output")) / FOLDER / "hub-0.ring"
            while not ring.exists() or time.monotonic() - read_flight(ring).heard < 1.5:
                time.sleep(0.05)
            sys.exit(1)
        case "listen elsewhere each time":
            announce_address(Path(argument("--output")), f"tcp://127.0.0.1:{starts(folder, role)}", "run")
            while starts(folder, role) == 1 and not (
                running(folder / "ready", "actor") and running(folder / "ready", "learner")
            ):
                time.sleep(0.02)
            if starts(folder, role) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            wait_for_signal()
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
            FLIGHT.note("the last thing it did")
            FLIGHT.waits("a word that never comes", 1.0)
            wait_for_signal()


main()
