"""The screen shows what the folder holds."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from slipstream import display
from slipstream.config import RunConfig, load_config
from slipstream.metrics import FILE, append_row
from slipstream.run_folder import write_json
from slipstream.snapshot import take_snapshot

CONFIG = load_config("research", ["steps=100"])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    append_row(tmp_path / FILE, {"kind": "warmup", "step": 100, "success": 0.4, "time": 900.0})
    for step in (9, 10):
        append_row(
            tmp_path / FILE,
            {"kind": "train", "step": step, "time": 1000.0 + 2 * step, "success": 0.5, "reward": 0.25,
             "slip/mean": 1.5, "slip/histogram": [10, 30], "actors/tokens_per_s": 9000.0,
             "tokens/trained_per_s": 8000.0, "wait/learner_starved": 0.1},
        )  # fmt: skip
    append_row(tmp_path / FILE, {"kind": "evaluation", "step": 10, "success": 0.75, "tasks": 64})
    status = {
        "version": 10,
        "books": {"made": 1512, "dropped_by_slip": 3},
        "learner_waits": {"batch": 11, "seconds": 0.84},
        "actors_blocked_by_gate": ["actor-1"],
        "actors": {"actor-0": {"leased": 128, "silent_s": 0.1}},
        "success": [{"step": 5, "success": 0.5}],
    }
    write_json(tmp_path / "status.json", status)
    return tmp_path


def test_snapshot(run: Path) -> None:
    snapshot = take_snapshot(CONFIG, run, "training")
    assert (snapshot.step, snapshot.steps, snapshot.left_s) == (10, 100, 180.0)
    assert snapshot.evaluations == [(0, 0.4), (5, 0.5), (10, 0.75)]
    assert snapshot.slip_histogram == [20, 60]
    assert snapshot.waiting == [
        "learner waits for batch 11 since 0.8 s",
        "actor-1 waits for the learner: max_slip allows no new episodes",
    ]
    assert snapshot.actors == ["actor-0  128 episodes, heard 0.1 s ago"]


def test_an_empty_folder_has_a_picture_too(tmp_path: Path) -> None:
    snapshot = take_snapshot(RunConfig(), tmp_path, "warm start")
    assert (snapshot.step, snapshot.steps) == (0, 600)
    stream = io.StringIO()
    Console(file=stream, width=100).print(display.picture(snapshot, [], "t"))
    assert "step 0 of 600" in stream.getvalue()


def test_picture(run: Path) -> None:
    stream = io.StringIO()
    picture = display.picture(take_snapshot(CONFIG, run, "training"), ["12:00:00 hello"], "Slipstream · a")
    Console(file=stream, width=120).print(picture)
    shown = stream.getvalue()
    for text in (
        "Slipstream · a", "2/4 training", "step 10 of 100", "3:00 left",
        "0.750   ▄▅▆   from 0.400, best 0.750 at step 10", " 1 █████████████████████ 75%",
        "mean 1.50 versions", "9,000 generated   8,000 trained", "starved 10%",
        "made 1,512   dropped by slip 3", "12:00:00 hello",
    ):  # fmt: skip
        assert text in shown, shown


def test_plain_lines_when_the_stream_is_no_terminal(run: Path) -> None:
    stream = io.StringIO()
    screen = display.make_screen(CONFIG, run, stream)
    assert isinstance(screen, display.PlainScreen)
    screen = display.PlainScreen(CONFIG, run, stream, every_s=0.0)
    with screen:
        screen.stage("training")
        screen.refresh()
        screen.finish({"success_warm_start": 0.4, "success_best": 0.9, "success_ci95": [0.88, 0.92]})
    assert "stage 2/4: training" in stream.getvalue()
    assert (
        "training step 10/100 · success 0.75 held-out, 0.50 training · reward 0.25 · slip 1.50 · "
        "tok/s 9,000 generated, 8,000 trained · left 3:00\n"
    ) in stream.getvalue()
    assert "0.90 best (95 % interval 0.880 to 0.920)" in stream.getvalue()


def test_live_screen_draws_on_a_terminal(run: Path) -> None:
    stream = io.StringIO()
    screen = display.LiveScreen(CONFIG, run, Console(file=stream, force_terminal=True, width=120))
    with screen:
        screen.stage("training")
        screen.event("actor-0 was killed by SIGKILL")
        screen.refresh()
        screen.finish({})
    assert "actor-0 was killed by SIGKILL" in stream.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(None, "–"), (0.4, "0:00"), (125, "2:05"), (3723, "1:02:03")])
def test_clock(seconds: float | None, text: str) -> None:
    assert display.clock(seconds) == text


def test_sparkline_clips_to_its_range() -> None:
    assert display.sparkline([-1.0, 0.0, 0.5, 1.0, 2.0]) == "▁▁▅██"
