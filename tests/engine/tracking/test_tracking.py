"""Sinks: rows arrive where they are mirrored to, and whatever a sink does, the run goes on."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from slipstream import config as configuration
from slipstream import launch
from slipstream.config import TrackingConfig, load_config
from slipstream.display import PlainScreen
from slipstream.errors import ConfigurationError
from slipstream.metrics import FILE, Row, append_row, read_rows
from slipstream.run_folder import read_json
from slipstream.tracking.keeper import Tracking
from slipstream.tracking.mirror import QUEUE_ROWS, Mirror
from slipstream.tracking.sinks import scalars

FAKE_ROLE = Path(__file__).parents[1] / "fake_role.py"
HANGS_S = 60.0

STAND_IN = """
import json, os, threading
class Settings:
    def __init__(self, **given): pass
class Run:
    def define_metric(self, *names, **given): pass
    def log(self, row):
        MISBEHAVE_LOG
        with open(os.environ["TAKEN"], "a") as file:
            file.write(json.dumps(row) + "\\n")
    def finish(self):
        MISBEHAVE_FINISH
def init(**given):
    MISBEHAVE_INIT
    return Run()
"""
HANG = "threading.Event().wait()"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Return a maker of a package wandb that misbehaves where told; it gives the file of taken rows."""

    def make(**where: str) -> Path:
        source = STAND_IN
        for place in ("LOG", "FINISH", "INIT"):
            source = source.replace(f"MISBEHAVE_{place}", where.get(place.lower(), "pass"))
        packages = tmp_path / "packages"
        (packages / "wandb").mkdir(parents=True)
        (packages / "wandb" / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(packages)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(packages), *filter(None, sys.path)]))
        monkeypatch.setenv("TAKEN", str(tmp_path / "taken"))
        return tmp_path / "taken"

    return make


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a configuration and three rows."""
    folder = tmp_path / "run"
    folder.mkdir()
    configuration.save(load_config("research"), folder / "config.toml")
    for step in range(3):
        append_row(folder / FILE, {"kind": "train", "step": step, "success": step / 4, "slip/histogram": [1]})
    return folder


WANDB = TrackingConfig(wandb="project", grace_s=HANGS_S)
HASTY = TrackingConfig(wandb="project", grace_s=0.2)


def test_numbers_of_a_row_go_by_kind_and_name() -> None:
    row = {"kind": "train", "step": 3, "time": 1.0, "success": 0.5, "best": True, "x": [1], "y": None}
    assert scalars(row) == {"train/success": 0.5, "train/best": 1.0}


def test_rows_arrive_once_also_when_the_run_goes_on_later(stand_in, run: Path) -> None:  # type: ignore[no-untyped-def]
    taken, said = stand_in(), list[str]()
    with Tracking(WANDB, run, on_event=said.append):
        append_row(run / FILE, {"kind": "evaluation", "step": 3, "success": 0.9})
    assert [json.loads(line) for line in taken.read_text().splitlines()] == [
        {"train/success": 0.0, "train/step": 0},
        {"train/success": 0.25, "train/step": 1},
        {"train/success": 0.5, "train/step": 2},
        {"evaluation/success": 0.9, "evaluation/step": 3},
    ]
    with Tracking(WANDB, run, on_event=said.append):
        append_row(run / FILE, {"kind": "train", "step": 4})
    assert len(taken.read_text().splitlines()) == 5
    assert said == []


def test_a_sink_that_hangs_costs_its_rows_and_nothing_else(stand_in, run: Path) -> None:  # type: ignore[no-untyped-def]
    stand_in(log=HANG)
    said: list[str] = []
    with Tracking(HASTY, run, on_event=said.append) as tracking:
        tracking.look()
    log = run / "logs" / "tracking-wandb.log"
    assert said == [f"tracking.wandb lacks 3 of 3 rows; all are in metrics.jsonl; see {log}"]


def test_a_sink_that_fails_is_counted_and_logged_once(stand_in, run: Path) -> None:  # type: ignore[no-untyped-def]
    stand_in(log="raise ValueError('no such project')")
    said: list[str] = []
    with Tracking(WANDB, run, on_event=said.append):
        pass
    log = run / "logs" / "tracking-wandb.log"
    assert said == [f"tracking.wandb lacks 3 of 3 rows; all are in metrics.jsonl; see {log}"]
    assert log.read_text().count("ValueError: no such project") == 1


def test_a_sink_that_never_finishes_is_told(stand_in, run: Path) -> None:  # type: ignore[no-untyped-def]
    taken, said = stand_in(finish=HANG), list[str]()
    with Tracking(HASTY, run, on_event=said.append):
        end = time.monotonic() + HANGS_S
        while _written(run) < 3 and time.monotonic() < end:
            time.sleep(0.02)
    assert len(taken.read_text().splitlines()) == 3
    assert said == [
        "tracking.wandb did not finish within tracking.grace_s = 0.2; all rows are in metrics.jsonl"
    ]


def _written(run: Path) -> int:
    return int(read_json(run / "tracking" / "wandb.json").get("written") or 0)


def test_a_sink_that_ends_its_process_is_told_once(stand_in, run: Path) -> None:  # type: ignore[no-untyped-def]
    stand_in(log="os._exit(7)")
    said: list[str] = []
    with Tracking(WANDB, run, on_event=said.append) as tracking:
        end = time.monotonic() + HANGS_S
        while not said and time.monotonic() < end:
            tracking.look()
            time.sleep(0.02)
        tracking.look()
    log = run / "logs" / "tracking-wandb.log"
    assert said[0] == (
        f"tracking.wandb has ended (7), see {log}; the run goes on without it, its rows are in metrics.jsonl"
    )


@pytest.mark.parametrize(
    ("init", "start_s", "sentence"),
    [
        ("raise RuntimeError('api_key not\\nconfigured')", HANGS_S, "RuntimeError: api_key not configured"),
        ("raise SystemExit(3)", HANGS_S, "SystemExit: 3"),
        ("os._exit(3)", HANGS_S, "it ended without a word"),
        (HANG, 1.0, "not ready within 1 s"),
    ],
)
def test_a_sink_that_cannot_start_is_one_sentence_at_the_start(  # type: ignore[no-untyped-def]
    stand_in, run: Path, init: str, start_s: float, sentence: str
) -> None:
    stand_in(init=init)
    log = run / "logs" / "tracking-wandb.log"
    with (
        pytest.raises(ConfigurationError) as caught,
        Tracking(HASTY, run, on_event=print, start_s=start_s),
    ):
        pass
    assert str(caught.value) == f"tracking.wandb cannot start: {sentence}; see {log}, or leave it out"


def test_a_package_that_is_missing_is_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.extras.find_spec", lambda name: None)
    with (
        pytest.raises(ConfigurationError, match=r"tracking\.wandb needs the extra wandb, and wandb is not"),
        Tracking(WANDB, run, on_event=print),
    ):
        pass


def test_the_launcher_ends_well_beside_a_sink_that_hangs(stand_in, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    stand_in(log=HANG)
    made = load_config("research", ["actor.count=1", "tracking.wandb=mine", "tracking.grace_s=0.2"])
    folder, stream = tmp_path / "run", io.StringIO()
    (tmp_path / "plan.json").write_text("{}")
    code = launch.train(
        made,
        folder,
        resume=False,
        serial=False,
        screen=PlainScreen(made, folder, stream),
        program=(sys.executable, str(FAKE_ROLE)),
    )
    assert code == 0
    rows = len((folder / FILE).read_text().splitlines())
    assert f"tracking.wandb lacks {rows} of {rows} rows; all are in metrics.jsonl" in stream.getvalue()
    assert len(read_rows(folder)) == 4


class Slow:
    """A sink that holds the first row until it is let go."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()
        self.taken: list[Row] = []

    def write(self, row: Row) -> None:
        self.entered.set()
        assert self.released.wait(timeout=HANGS_S)
        self.taken.append(row)

    def close(self) -> None:
        pass


def test_the_queue_is_bounded_and_what_it_drops_is_counted(tmp_path: Path) -> None:
    sink, stopping = Slow(), threading.Event()
    mirror = Mirror(tmp_path, sink, tmp_path / "wandb.json", identity="x")
    thread = threading.Thread(target=mirror.run, args=(stopping, HANGS_S))
    append_row(tmp_path / FILE, {"step": 0})
    thread.start()
    assert sink.entered.wait(timeout=HANGS_S)
    with (tmp_path / FILE).open("a") as file:
        file.writelines(f'{{"step": {step}}}\n' for step in range(1, QUEUE_ROWS + 8))
        file.write('{"step": torn')
    end = time.monotonic() + HANGS_S
    while mirror.rows < QUEUE_ROWS + 8 and time.monotonic() < end:
        time.sleep(0.02)
    sink.released.set()
    stopping.set()
    thread.join(timeout=HANGS_S)
    assert (mirror.rows, mirror.written, mirror.dropped) == (QUEUE_ROWS + 8, QUEUE_ROWS + 1, 7)
    assert [row["step"] for row in sink.taken] == list(range(QUEUE_ROWS + 1))
    told = json.loads((tmp_path / "wandb.json").read_text())
    assert (told["rows"], told["written"], told["dropped"]) == (QUEUE_ROWS + 8, QUEUE_ROWS + 1, 7)


def test_tensorboard_itself(run: Path) -> None:
    pytest.importorskip("tensorboard")
    said: list[str] = []
    with Tracking(TrackingConfig(tensorboard=True, grace_s=HANGS_S), run, on_event=said.append):
        append_row(run / FILE, {"kind": "evaluation", "step": 3, "success": 0.875})
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (file,) = (run / "tensorboard").iterdir()
    events = list(EventFileLoader(str(file)).Load())
    found = [(event.step, value.tag) for event in events for value in event.summary.value]
    assert found == [*((step, "train/success") for step in range(3)), (3, "evaluation/success")]
    assert said == []


def test_wandb_itself_offline(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    said: list[str] = []
    with Tracking(WANDB, run, on_event=said.append):
        append_row(run / FILE, {"kind": "evaluation", "step": 3, "success": 0.875})
    assert said == []
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    assert b"evaluation/success" in file.read_bytes()
