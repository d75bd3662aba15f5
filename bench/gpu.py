"""Everything of the kernels that needs a GPU, in one command of less than nine minutes.

    python bench/gpu.py [--output FOLDER] [--deadline SECONDS] [--op NAME]... [--backend NAME]...
                        [--part PART] [--rehearse]

First every op and backend against float64, then the benchmark at the sizes a GPU trains, in one folder:
correctness.md, table.md, figures.md, ratios.svg, and the rows as JSON lines, written one by one. A process of
its own does the work: one that crashes or hangs costs the item it was at, and the next one goes on behind it.
At the deadline what is there is what there is. Needs torch, Triton and NumPy only. --part takes one of the
two, or `tiles`, which tries the candidates for the tiles of the heads instead (tiles.md). --backend leaves
out the others, and eager PyTorch and the peers with them, which take most of the time. --rehearse runs the
same on the CPU at tiny shapes.

Exit codes: 0; 1 when a result is wrong or an item crashed; 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Final, TypeAlias

HERE: Final = Path(__file__).resolve().parent
if find_spec("slipstream_kernels") is None:
    sys.path.insert(0, str(HERE.parent / "kernels"))

Message = dict[str, Any]
Item: TypeAlias = tuple[str, Callable[[], Iterator[tuple[str, Message]]]]
CORRECTNESS: Final = "correctness"
BENCHMARK: Final = "benchmark"
TILES: Final = "tiles"
PARTS: Final = (CORRECTNESS, BENCHMARK, TILES)
OUTPUT: Final = Path("runs") / "bench-gpu"
DEADLINE_S: Final = 520.0
EXIT_S: Final = 10.0
"""A process that has closed its output ends sooner, or hangs."""
ITEM_S: Final = 150.0
"""An item that takes longer hangs."""
REHEARSED_OPS: Final = ("linear_policy_loss", "policy_loss", "checksum64")
NO_DEVICE: Final = 2
BEGAN: Final = time.monotonic()
VERDICTS: Final = "verdicts.jsonl"


@dataclass(slots=True, kw_only=True)
class Run:
    """What came back so far."""

    folder: Path
    ends_at: float
    environment: Message = field(default_factory=dict)
    verdicts: list[Message] = field(default_factory=list)
    rows: list[Message] = field(default_factory=list)
    tiles: list[Message] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Items that crashed or hung, with the reason."""
    cut: bool = False
    """Whether the deadline came first."""
    options: tuple[str, ...] = ()
    """What the working process is told beside the first item."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all items and write the folder."""
    parser = argparse.ArgumentParser(
        prog="gpu.py", description="Kernels on a GPU: correctness, then benchmark."
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"folder; default {OUTPUT}")
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, help="seconds until it is cut off")
    parser.add_argument("--op", action="append", default=[], help="only this op; may be repeated")
    parser.add_argument("--backend", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--part", choices=PARTS, help="only this one; tiles: candidates for the heads' tiles")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny shapes")
    parser.add_argument("--from-item", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.from_item is not None:
        return work(chosen, chosen.from_item)
    if not chosen.rehearse and not has_device():
        sys.stderr.write("gpu.py: torch sees no CUDA device here; --rehearse runs the same on the CPU\n")
        return NO_DEVICE
    options = [f"--op={op}" for op in chosen.op] + ["--rehearse"] * chosen.rehearse
    options += [f"--backend={backend}" for backend in chosen.backend]
    options += [f"--part={chosen.part}"] * (chosen.part is not None)
    run = Run(folder=chosen.output, ends_at=time.monotonic() + chosen.deadline, options=tuple(options))
    item: int | None = 0
    while item is not None:
        item = follow(run, item)
    return finish(run)


def has_device() -> bool:
    """Return whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


# The side that waits: it never touches the device.


def follow(run: Run, first: int) -> int | None:
    """Let a process work from item `first` on; return the item to go on with, None at the end."""
    command = [sys.executable, str(HERE / "gpu.py"), "--from-item", str(first), *run.options]
    # Variants that take nearly all memory follow one another: fragments of one must not stop the next.
    variables = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as process:
        try:
            return listened(run, process, first)
        finally:
            process.kill()


def listened(run: Run, process: subprocess.Popen[str], first: int) -> int | None:
    """Take messages until the process ends, hangs or the deadline comes."""
    messages = received(process)
    item, name = first, f"item {first}"
    while True:
        left_s = run.ends_at - time.monotonic()
        try:
            message = messages.get(timeout=max(0.0, min(left_s, ITEM_S)))
        except queue.Empty:
            if run.ends_at - time.monotonic() <= 0:
                run.cut = True
                say(f"deadline: cut off at {name}")
                return None
            run.lost.append(f"{name}: no result after {ITEM_S:.0f} s")
            return item + 1
        if message is None:
            run.lost.append(f"{name}: its process ended with {status_of(process)}")
            return item + 1
        match message["kind"]:
            case "end":
                return None
            case "item":
                item, name = message["item"], message["name"]
                say(name)
            case _:
                take(run, message)


def status_of(process: subprocess.Popen[str]) -> int:
    """Return the exit status of a process that says nothing more; one that hangs on a device is killed."""
    try:
        return process.wait(timeout=EXIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(timeout=EXIT_S)


def received(process: subprocess.Popen[str]) -> queue.Queue[Message | None]:
    """Return a queue of the process's messages, None behind the last."""
    messages: queue.Queue[Message | None] = queue.Queue()

    def read(stream: IO[str]) -> None:
        for line in stream:
            messages.put(json.loads(line))
        messages.put(None)

    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    return messages


def take(run: Run, message: Message) -> None:
    """Keep a message, and write it at once."""
    from kernels_suite import report

    match message["kind"]:
        case "environment":
            run.environment = message["row"]
            report.start(run.folder, run.environment)
            (run.folder / VERDICTS).write_text("", encoding="utf-8")
        case "verdict":
            run.verdicts.append(message["row"])
            report.append(run.folder, message["row"], VERDICTS)
        case "tile":
            run.tiles.append(message["row"])
        case _:
            run.rows.append(message["row"])
            report.append(run.folder, message["row"])


def finish(run: Run) -> int:
    """Write the tables; return the exit code."""
    from kernels_suite import correctness, figures, report, tiles

    for reason in run.lost:
        say(f"lost: {reason}")
    if not run.environment:
        sys.stderr.write("gpu.py: nothing was measured; the messages above say why\n")
        return 1
    lost = "".join(f"- lost: {reason}\n" for reason in run.lost)
    cut = "\nCut off by the deadline.\n" if run.cut else ""
    (run.folder / "correctness.md").write_text(correctness.table(run.verdicts) + cut + lost, encoding="utf-8")
    if run.tiles:
        (run.folder / "tiles.md").write_text(tiles.table(run.tiles) + cut + lost, encoding="utf-8")
    (run.folder / "figures.md").write_text(figures.table(run.rows) + cut + lost, encoding="utf-8")
    report.finish(run.folder, run.environment, run.rows)
    wrong = correctness.failed(run.verdicts)
    for row in wrong:
        say(f"wrong: {json.dumps(row, ensure_ascii=False)}")
    say(f"{len(run.verdicts)} verdicts, {len(wrong)} wrong; {len(run.rows)} rows; in {run.folder}")
    return 1 if wrong or run.lost else 0


# The side that works.


def work(chosen: argparse.Namespace, first: int) -> int:
    """Do the items from `first` on, telling each result through the standard output."""
    from kernels_suite import report

    # Compilers print too; what they print belongs to the error output.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(**message: Any) -> None:
        channel.write(json.dumps(report.clean(message)) + "\n")
        channel.flush()

    for number, (name, run) in enumerate(items(chosen)):
        if number >= first:
            tell(kind="item", item=number, name=name)
            for kind, row in run():
                tell(kind=kind, row=row)
    tell(kind="end")
    return 0


def items(chosen: argparse.Namespace) -> Iterator[Item]:
    """Yield name and work of each item: the environment, correctness of the ops, then the benchmark."""
    from kernels_suite.plan import Place, Scale, training_dtype

    device, scale = ("cpu", Scale.SMOKE) if chosen.rehearse else ("cuda", Scale.GPU)
    place = Place(device=device, scale=scale, dtype=training_dtype(device))
    yield "environment and ceilings", partial(environment, place)
    if chosen.part in (None, CORRECTNESS):
        yield from proofs(device, chosen.rehearse, chosen.op, chosen.backend)
    if chosen.part in (None, BENCHMARK):
        yield from timings(place, chosen.rehearse, chosen.op, chosen.backend)
    if chosen.part == TILES:
        yield from trials(device, chosen.rehearse)


def trials(device: str, rehearse: bool) -> Iterator[Item]:
    """Yield each candidate for a tile of the heads."""
    from kernels_suite import tiles

    def work(candidate: tiles.Candidate) -> Iterator[tuple[str, Message]]:
        yield "tile", tiles.tried(candidate, device)

    for candidate in tiles.candidates(rehearse):
        yield f"tile {candidate.name}", partial(work, candidate)


def only(case: Any, backends: Sequence[str]) -> Any:
    """Return the case with these variants, or with all."""
    return replace(case, variants=tuple(v for v in case.variants if not backends or v.name in backends))


def proofs(device: str, rehearse: bool, ops: Sequence[str], backends: Sequence[str]) -> Iterator[Item]:
    """Yield each comparison with float64."""
    from kernels_suite import accuracy, correctness

    for case in correctness.cases(device):
        if ops and case.op not in ops:
            continue
        if rehearse and (case.op not in (ops or REHEARSED_OPS) or case.shape.startswith(("wide", "long"))):
            continue
        wanted = [*backends, case.eager] if backends and accuracy.follows_eager(case) else backends
        yield f"correctness of {case.key}", partial(judged, only(case, wanted))


def timings(place: Any, rehearse: bool, ops: Sequence[str], backends: Sequence[str]) -> Iterator[Item]:
    """Yield each case that is timed."""
    from kernels_suite import machine
    from kernels_suite.measure import GPU, SMOKE, Setting
    from kernels_suite.suite import CASES

    from slipstream_kernels import Backend

    device = place.device
    setting = Setting(
        device=device,
        effort=SMOKE if rehearse else GPU,
        cache_bytes=machine.cache_bytes(device),
        command=f"slipstream bench kernels --op {{op}} --device {device}",
    )
    # The one that has no figure to reach comes last: it is the one to lose to the deadline.
    for op in ops or (REHEARSED_OPS if rehearse else sorted(CASES, key=lambda op: op == "linear_kl")):
        for number, case in enumerate(CASES[op](place)):
            # The reference proves results above; at these sizes it would take most of the time.
            chosen = only(case, backends).variants
            timed = tuple(v for v in chosen if v.name != Backend.REFERENCE or v.name == case.eager)
            yield f"benchmark of {case.key}", partial(measured, replace(case, variants=timed), setting)
            if number and rehearse:
                break


def environment(place: Any) -> Iterator[tuple[str, Message]]:
    """Yield where it runs, with its ceilings."""
    from kernels_suite import machine
    from kernels_suite.suite import ceilings

    yield "environment", machine.environment(place.device) | {"ceilings": ceilings(place)}


def judged(case: Any) -> Iterator[tuple[str, Message]]:
    """Yield the verdict on each backend."""
    from kernels_suite import correctness

    yield from (("verdict", row) for row in correctness.verdicts(case))


def measured(case: Any, setting: Any) -> Iterator[tuple[str, Message]]:
    """Yield a row for each variant."""
    from kernels_suite import measure

    yield from (("row", row) for row in measure.measure(case, setting))


def say(text: str) -> None:
    """Print one line at once, with the seconds since the start."""
    sys.stdout.write(f"{time.monotonic() - BEGAN:6.1f} s  {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
