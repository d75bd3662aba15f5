"""Floor 4. The process that mirrors the rows of a run to one sink.

    python -m slipstream.tracking.mirror FOLDER NAME PROJECT GRACE_S PARENT

It says "ready", or why the sink cannot start, in one line on its standard output. SIGTERM makes it read what
is left and finish within GRACE_S; then it ends whatever the sink does.

wait              ends after
a new row         a look, twice a second
room in the queue never waited for: the row is dropped and counted
the sink          GRACE_S from SIGTERM on; until then nothing waits for it
"""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from slipstream import plain_json, run_folder
from slipstream.foreign import Contained
from slipstream.metrics import FILE, Row
from slipstream.process import guard_parent
from slipstream.tracking.sinks import Sink, make_sink

FOLDER: Final = "tracking"
"""Of the run's folder, where each mirror writes down how far it is."""
QUEUE_ROWS: Final = 1024
_LOOK_S: Final = 0.5
_MOST_BYTES: Final = 16 << 20
"""Read at once."""

log = logging.getLogger(__name__)


def main(folder: Path, name: str, project: str, grace_s: float) -> int:
    """Mirror until SIGTERM; returns 0, also when the sink took nothing."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the sink's package prints is for the log
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher says when to end
    progress = folder / FOLDER / f"{name}.json"
    progress.parent.mkdir(exist_ok=True)
    known = run_folder.read_json(progress)
    identity = str(known.get("identity") or secrets.token_hex(8))
    try:
        sink = make_sink(name, folder, project, identity)
    except BaseException as error:  # a package may also exit
        log.exception("%s does not start", name)
        said.write(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}\n")
        said.flush()
        return 2
    mirror = Mirror(folder, sink, progress, identity=identity, offset=int(known.get("offset") or 0))
    said.write("ready\n")
    said.close()
    mirror.run(stopping, grace_s)
    return 0


class Mirror:
    """Reads the file, and hands its rows to the sink's thread."""

    def __init__(self, folder: Path, sink: Sink, progress: Path, *, identity: str, offset: int = 0) -> None:
        """Go on at byte `offset` of the rows."""
        self._file, self._sink, self._progress = folder / FILE, sink, progress
        self._identity, self._offset = identity, offset
        self._queue: queue.Queue[Row] = queue.Queue(QUEUE_ROWS)
        self._reading_done = threading.Event()
        self.rows = self.written = self.dropped = self.failed = 0
        self.closed = False

    def run(self, stopping: threading.Event, grace_s: float) -> None:
        """Mirror until `stopping` is set, and finish within `grace_s`."""
        worker = threading.Thread(target=self._feed, daemon=True, name="sink")
        worker.start()
        while not stopping.wait(_LOOK_S):
            self._read()
        end = time.monotonic() + grace_s
        self._read()
        self._reading_done.set()
        worker.join(timeout=max(0.0, end - time.monotonic()))
        self._note()

    def _read(self) -> None:
        for row in self._new_rows():
            self.rows += 1
            try:
                self._queue.put_nowait(row)
            except queue.Full:
                self.dropped += 1
        self._note()

    def _new_rows(self) -> Iterator[Row]:
        """Yield the rows whose lines are whole."""
        try:
            with self._file.open("rb") as file:
                file.seek(self._offset)
                data = file.read(_MOST_BYTES)
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                row = plain_json.parse(line)
            except ValueError:
                continue  # torn by a crash
            if isinstance(row, dict):
                yield row

    def _feed(self) -> None:
        """Give rows to the sink until there will be no more; nobody waits for this thread."""
        while True:
            try:
                row = self._queue.get(timeout=_LOOK_S)
            except queue.Empty:
                if self._reading_done.is_set():
                    break
                continue
            with Contained() as wrote:
                self._sink.write(row)
                self.written += 1
            if wrote.error is not None:
                self.failed += 1
                if self.failed == 1:
                    log.error("the sink refused a row; later ones are only counted", exc_info=wrote.error)
        with Contained() as ended:
            self._sink.close()
            self.closed = True
        if ended.error is not None:
            log.error("the sink does not close", exc_info=ended.error)

    def _note(self) -> None:
        told: dict[str, Any] = {
            "identity": self._identity,
            "offset": self._offset,
            "rows": self.rows,
            "written": self.written,
            "dropped": self.dropped,
            "failed": self.failed,
            "closed": self.closed,
        }
        try:
            run_folder.write_json(self._progress, told)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._progress, json.dumps(error.strerror))


if __name__ == "__main__":
    guard_parent(int(sys.argv[5]))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    code = main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]))
    # A thread of the sink's that hangs cannot keep the process.
    os._exit(code)
