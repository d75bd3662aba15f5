"""A run whose log is shortened as checkpoints cover it: what is gone is not missed, also after a kill."""

import json
import signal
from collections.abc import Callable

import pytest
from runs import Run, until

from slipstream import events
from slipstream.ingest import read_events
from slipstream.metrics import read_rows, rows_of

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]
SHORT = ("hub.segment_bytes=65536", "hub.retain_bytes=0", "checkpoint.every=2", "checkpoint.keep=1")


def first_segment(run: Run) -> int:
    return min((int(path.stem) for path in (run.folder / "trajectories").glob("*.log")), default=0)


def test_a_shortened_log_is_enough_to_go_on_from(new_run: Callable[..., Run]) -> None:
    run = new_run("run", "steps=24", "environment.tool_latency_s=0.05", *SHORT)
    train = run.start()
    until(lambda: train.popen.poll() is not None or first_segment(run) > 0, "the log to be shortened")
    train.signal(signal.SIGKILL)
    assert train.end().code == -signal.SIGKILL
    cut_at = first_segment(run)
    assert cut_at > 0
    ended = run.resume().end()
    assert ended.code == 0, run.story(ended)
    assert first_segment(run) > cut_at
    opening = next(iter(read_events(run.folder / "trajectories"))).event
    assert isinstance(opening, events.State)
    books = json.loads((run.folder / "status.json").read_text())["books"]
    assert books["trained"] == run.config.steps * run.config.batch.trajectories
    assert [row["step"] for row in rows_of(read_rows(run.folder), "train")] == list(range(1, 25))
