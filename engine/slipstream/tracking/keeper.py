"""Floor 4. The launcher's side of tracking: starts a mirror for each configured sink, and ends it in time."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from slipstream import run_folder
from slipstream.config import TrackingConfig
from slipstream.errors import ConfigurationError
from slipstream.extras import require
from slipstream.tracking.mirror import FOLDER
from slipstream.tracking.sinks import SINKS

START_S: Final = 60.0
"""For a sink to say that it is there; W&B asks its server."""
_END_S: Final = 5.0
"""Beyond the mirror's own time to finish, until it is killed."""


@dataclass(slots=True, kw_only=True)
class _Mirror:
    name: str
    process: subprocess.Popen[bytes]
    told: bool = False
    """Whether its end has been said."""


class Tracking:
    """The mirrors of a run, as a context: entered when it begins, left when it ends.

    Example: ``with Tracking(config.tracking, folder, on_event=print) as tracking: ...; tracking.look()``.
    """

    def __init__(
        self,
        config: TrackingConfig,
        folder: Path,
        *,
        on_event: Callable[[str], None],
        start_s: float = START_S,
    ) -> None:
        """Start nothing yet; `on_event` is told what goes wrong, once."""
        self._config, self._folder, self._on_event, self._start_s = config, folder, on_event, start_s
        self._mirrors: list[_Mirror] = []

    def __enter__(self) -> Self:
        """Start what is configured; raises ConfigurationError with one sentence when that cannot be."""
        wanted = {name: getattr(self._config, name) for name in SINKS}
        try:
            for name, project in wanted.items():
                if project:
                    require(name, name, by=f"tracking.{name}")
                    self._start(name, project if isinstance(project, str) else "")
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End all: what is on its way has `tracking.grace_s`."""
        self._finish()

    def look(self) -> None:
        """Say once when a mirror has ended by itself; the run goes on without it."""
        for mirror in self._mirrors:
            if not mirror.told and mirror.process.poll() is not None:
                mirror.told = True
                self._on_event(
                    f"tracking.{mirror.name} has ended ({mirror.process.returncode}), see "
                    f"{self._log(mirror.name)}; the run goes on without it, its rows are in metrics.jsonl"
                )

    def _start(self, name: str, project: str) -> None:
        log = self._log(name)
        log.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "slipstream.tracking.mirror", str(self._folder), name, project]
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*command, str(self._config.grace_s), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        self._mirrors.append(_Mirror(name=name, process=process))
        said = _line(process, self._start_s)
        if said != "ready":
            raise ConfigurationError(
                f"tracking.{name} cannot start: {said or 'it ended without a word'}; see {log}, or leave it "
                "out"
            )

    def _finish(self) -> None:
        for mirror in self._mirrors:
            mirror.process.terminate()
        end = time.monotonic() + self._config.grace_s + _END_S
        for mirror in self._mirrors:
            with contextlib.suppress(subprocess.TimeoutExpired):
                mirror.process.wait(timeout=max(0.1, end - time.monotonic()))
        self._kill()
        for mirror in self._mirrors:
            self._account(mirror)

    def _kill(self) -> None:
        for mirror in self._mirrors:
            mirror.process.kill()
            mirror.process.wait(timeout=_END_S)
            if mirror.process.stdout is not None:
                mirror.process.stdout.close()

    def _account(self, mirror: _Mirror) -> None:
        """Say how many rows a sink has not taken."""
        books = run_folder.read_json(self._folder / FOLDER / f"{mirror.name}.json")
        rows, written = int(books.get("rows") or 0), int(books.get("written") or 0)
        if rows != written:
            self._on_event(
                f"tracking.{mirror.name} lacks {rows - written} of {rows} rows; all are in metrics.jsonl; "
                f"see {self._log(mirror.name)}"
            )
        elif books and not books.get("closed") and not mirror.told:
            self._on_event(
                f"tracking.{mirror.name} did not finish within tracking.grace_s = {self._config.grace_s:g}; "
                "all rows are in metrics.jsonl"
            )

    def _log(self, name: str) -> Path:
        return self._folder / "logs" / f"tracking-{name}.log"


def _line(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Return the first line that a process says within so many seconds."""
    assert process.stdout is not None
    said, end = b"", time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not said.endswith(b"\n"):
            if not selector.select(timeout=max(0.0, end - time.monotonic())):
                return f"not ready within {seconds:g} s"
            part = os.read(process.stdout.fileno(), 4096)
            if not part:
                break
            said += part
    return said.decode(errors="replace").strip()
