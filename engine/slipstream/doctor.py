"""Floor 6. What is wrong with a run: its processes, what each waits for, their last events in one time line.

Reads the rings of flight_recorder.py, /proc and the hub's status.json; it needs no process of the run to
answer.
"""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from slipstream.errors import RunFolderError
from slipstream.flight_recorder import FOLDER, STACKS, Flight, birth_of, boot_id, read_flights
from slipstream.run_folder import read_json
from slipstream.snapshot import actors_of, waits_of

QUIET_S: Final = 60.0
"""A living process that says nothing for so long counts as stalled."""
_SHOWN_EVENTS: Final = 30
_STACKS_S: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """One process of a run, as it is found."""

    flight: Flight
    state: str
    """running, stopped, dead, ended, or elsewhere: on another machine, or from before this one's restart."""


def examine(folder: Path, *, now: float | None = None, stalled: str = "") -> tuple[str, bool]:
    """Return a report on a run, and whether everything is well; `now` is on the monotonic clock.

    Living processes that look stalled, and the one named so, are asked for the stacks of their threads.
    Raises RunFolderError when no process of the run has recorded anything.
    """
    flights = read_flights(folder / FOLDER)
    if not flights:
        raise RunFolderError(
            f"{folder / FOLDER}: expected rings of flight recorders, found none; is it a run folder?"
        )
    moment = time.monotonic() if now is None else now
    patients = [Patient(flight=flight, state=_state(flight)) for flight in flights]
    findings = [*_findings(patients, moment), *_disk(folder)]
    lines = [f"run {folder}, {time.strftime('%Y-%m-%d %H:%M:%S')}", ""]
    lines += [_line(patient, moment) for patient in patients]
    lines += ["", *_queues(folder)]
    lines += ["findings:", *(f"  {finding}" for finding in findings or ["nothing is wrong"])]
    silent = [
        p for p in patients if p.state == "running" and (_stalled(p, moment) or p.flight.role == stalled)
    ]
    lines += _stacks(folder, silent)
    lines += ["", "last events:", *_time_line(flights)]
    return "\n".join(lines) + "\n", not findings


def _state(flight: Flight) -> str:
    if flight.ended:
        return "ended"
    if flight.boot != boot_id():
        return "elsewhere"
    # Another birth: another process that has only inherited the number.
    if birth_of(flight.pid) != flight.birth:
        return "dead"
    try:
        status = psutil.Process(flight.pid).status()
    except psutil.NoSuchProcess:
        return "dead"
    if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
        return "stopped"
    return "dead" if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else "running"


def _stalled(patient: Patient, now: float) -> bool:
    flight = patient.flight
    overdue = flight.wait is not None and now - flight.wait.since > flight.wait.seconds
    return patient.state == "running" and (overdue or now - flight.heard > QUIET_S)


def _findings(patients: Sequence[Patient], now: float) -> Iterator[str]:
    for patient in patients:
        flight, who = patient.flight, f"{patient.flight.role} (pid {patient.flight.pid})"
        quiet = f"{now - flight.heard:.0f} s"
        match patient.state:
            case "stopped":
                yield (
                    f"{who} was stopped by a signal, {quiet} ago or less: nothing it owes can come; let it go"
                    f" on with kill -CONT {flight.pid}"
                )
            case "dead":
                last = f"; its last event: {flight.events[-1].text}" if flight.events else ""
                yield f"{who} died {quiet} ago or less without an end of its own{last}"
            case "running" if _stalled(patient, now):
                wait = flight.wait
                waits = f" while it waits for {wait.what}" if wait is not None else ""
                yield f"{who} is alive, but gave no sign of life for {quiet}{waits}"
    yield from _waiting_for_the_stopped(patients, now)


def _waiting_for_the_stopped(patients: Sequence[Patient], now: float) -> Iterator[str]:
    """Say who suffers from those that cannot answer."""
    gone = {patient.flight.role.split("-")[0] for patient in patients if patient.state in ("stopped", "dead")}
    for patient in patients:
        wait = patient.flight.wait
        if patient.state == "running" and wait is not None and any(role in wait.what for role in gone):
            yield (
                f"{patient.flight.role} waits for it: {wait.what}, for {now - wait.since:.0f} of at most "
                f"{wait.seconds:g} s"
            )


def _disk(folder: Path) -> Iterator[str]:
    free = psutil.disk_usage(str(folder)).free
    if free < 64 << 20:
        yield f"the disk of {folder} has {free >> 20} MB left"


def _line(patient: Patient, now: float) -> str:
    flight, wait = patient.flight, patient.flight.wait
    if patient.state == "elsewhere":
        return f"  {flight.role:<12} pid {flight.pid:<8} elsewhere: ask on its machine, if it still runs"
    ago = f"last sign of life {now - flight.heard:.1f} s ago"
    waits = (
        ""
        if wait is None
        else f"; waits for {wait.what} ({now - wait.since:.1f} of at most {wait.seconds:g} s)"
    )
    return f"  {flight.role:<12} pid {flight.pid:<8} {patient.state:<8} {ago}{waits}"


def _queues(folder: Path) -> Iterator[str]:
    """Say what waits where, and who for whom, as the hub saw it last."""
    status = read_json(folder / "status.json")
    if not status:
        return
    age = time.time() - float(status.pop("time", time.time()))
    depths = {name: status.get(name, 0) for name in ("groups_buffered", "groups_open", "gate_room")}
    books = status.get("books", {})
    depths |= {name: books.get(name, 0) for name in ("leased", "waiting", "buffered", "evaluation_leased")}
    yield f"hub's last status, {age:.1f} s ago:"
    yield "  queues: " + ", ".join(f"{name} {depth}" for name, depth in depths.items())
    if running := status.get("evaluation"):
        yield f"  evaluation of step {running['step']}: {running['returned']} episodes returned"
    yield from (f"  {line}" for line in [*waits_of(status), *actors_of(status)])
    yield "  books: " + ", ".join(f"{name} {count}" for name, count in books.items() if count)
    yield ""


def _stacks(folder: Path, stalled: Sequence[Patient]) -> Iterator[str]:
    for patient in stalled:
        path = folder / FOLDER / f"{patient.flight.role}.stacks"
        before = path.stat().st_size if path.exists() else 0
        try:
            os.kill(patient.flight.pid, STACKS)
        except (ProcessLookupError, PermissionError) as error:
            yield f"no stacks of {patient.flight.role}: {error.strerror}"
            continue
        _await_growth(path, before)
        said = path.read_bytes()[before:].decode(errors="replace") if path.exists() else ""
        yield ""
        yield f"stacks of {patient.flight.role}:"
        yield said.strip() or f"  none within {_STACKS_S:g} s: it does not even take signals"


def _await_growth(path: Path, size: int) -> None:
    """Wait until a file has grown beyond a size, at most _STACKS_S."""
    end = time.monotonic() + _STACKS_S
    while time.monotonic() < end and not (path.exists() and path.stat().st_size > size):
        time.sleep(0.02)


def _time_line(flights: Sequence[Flight]) -> Iterator[str]:
    merged = heapq.nlargest(
        _SHOWN_EVENTS,
        ((event.time, flight.role, event.text) for flight in flights for event in flight.events),
    )
    for moment, role, text in reversed(merged):
        clock = time.strftime("%H:%M:%S", time.localtime(moment))
        yield f"  {clock}.{int(moment % 1 * 1000):03d} {role:<12} {text}"
