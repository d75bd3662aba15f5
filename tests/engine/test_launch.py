"""The launcher with real processes: what it leaves behind, and how it ends when a role does not behave."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from slipstream import launch, supervisor
from slipstream.config import RunConfig, load_config
from slipstream.display import PlainScreen
from slipstream.errors import NumericsError, RoleError, RunFolderError, StorageError, UserError
from slipstream.restarts import RestartBudget, restarts_of
from slipstream.supervisor import Patience

ROLE = Path(__file__).with_name("fake_role.py")
PROGRAM = (sys.executable, str(ROLE))
HANGS_S = 100.0
"""Far above what anything takes: it only ends tests that hang."""
STALL_S = 3.0
"""Longer than a busy machine lets a process that beats twenty times a second wait."""
NO_RESTARTS = ("supervision.restarts=0", "supervision.actor_restarts=0")
PATIENCE = Patience(stop_s=HANGS_S, finish_s=HANGS_S, stall_s=HANGS_S, backoff_s=0.01)

DRIVER = f"""
import signal, sys
from pathlib import Path
from slipstream import launch
from slipstream.config import load_config
from slipstream.display import PlainScreen
from slipstream.supervisor import Patience
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
folder = Path(sys.argv[1])
config = load_config("research", ["actor.count=1"])
screen = PlainScreen(config, folder, sys.stdout)
sys.exit(launch.train(config, folder, resume=False, serial=False, screen=screen,
         program=(sys.executable, {str(ROLE)!r}), patience=Patience(stop_s=100.0)))
"""


def plan(tmp_path: Path, **roles: str) -> Path:
    (tmp_path / "plan.json").write_text(json.dumps(roles))
    return tmp_path / "run"


def want(tmp_path: Path, **starts: int) -> None:
    """Let the learner wait until these roles were started so often."""
    (tmp_path / "wanted.json").write_text(json.dumps(starts))


def train(
    folder: Path,
    *,
    resume: bool = False,
    settings: Sequence[str] = (),
    config: RunConfig | None = None,
    patience: Patience = PATIENCE,
    other_versions: bool = False,
) -> str:
    """Run the launcher here and return what it showed."""
    config = config or load_config("research", ["actor.count=1", *settings])
    stream = io.StringIO()
    screen = PlainScreen(config, folder, stream)
    try:
        code = launch.train(
            config, folder, resume=resume, serial=False, screen=screen, program=PROGRAM, patience=patience,
            other_versions=other_versions,
        )  # fmt: skip
    except (RoleError, UserError, NumericsError) as error:
        error.add_note(stream.getvalue())
        raise
    assert code == 0, stream.getvalue()
    return stream.getvalue()


def alive(tmp_path: Path) -> list[str]:
    """Return the started roles that still run."""
    return [path.name for path in (tmp_path / "pids").glob("*") if _runs(int(path.name.rpartition("-")[2]))]


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + HANGS_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {HANGS_S:g} s for {what}"
        time.sleep(0.02)


def starts(tmp_path: Path, role: str) -> int:
    return len(list((tmp_path / "pids").glob(f"{role}-*")))


def ready(tmp_path: Path, *roles: str) -> bool:
    """Tell whether each of these has come to where it acts on signals as planned."""
    return all(any((tmp_path / "ready").glob(f"{role}-*")) for role in roles)


def test_a_run_goes_on_only_with_the_versions_it_began_with(tmp_path: Path) -> None:
    folder = plan(tmp_path)
    train(folder)
    recorded = json.loads((folder / "versions.json").read_text())
    assert set(recorded) == {"python", "slipstream", "torch"}
    (folder / "versions.json").write_text(json.dumps({**recorded, "torch": "0.1"}))
    with pytest.raises(RunFolderError, match=r"begun with other versions: torch is .* here and was 0\.1;"):
        train(folder, resume=True)
    shown = train(folder, resume=True, other_versions=True)
    assert f"going on with another version: torch is {recorded['torch']} here and was 0.1" in shown
    assert json.loads((folder / "versions.json").read_text()) == recorded


def test_a_run_leaves_summary_curve_configuration_and_logs(tmp_path: Path) -> None:
    folder = plan(tmp_path)
    settings = ["actor.count=1", "actor.threads=2", "evaluation.final_tasks=100"]
    shown = train(folder, config=load_config("research", settings))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["success_warm_start"] == 0.4
    assert summary["success_final"] == 0.8
    assert summary["success_best"] == 0.9
    assert summary["success_ci95"] == pytest.approx([0.8256343, 0.9447709], abs=1e-6)
    assert summary["baselines"] == {"do_nothing": {"success": 0.0, "source": "answers nothing"}}
    assert (summary["steps"], summary["trajectories"], summary["dropped"]) == (2, 8, 3)
    assert (summary["tokens_generated"], summary["tokens_trained"]) == (100, 30)
    assert summary["slip_mean"] == pytest.approx((10 * 1 + 20 * 2) / 30)
    assert summary["slip_max"] == 3
    assert summary["learner_starved_share"] == pytest.approx(0.15)
    assert summary["seed"] == 1
    assert set(summary["stage_seconds"]) == {"warm start", "training", "final evaluation", "learning curve"}
    assert summary["wall_seconds"] == pytest.approx(sum(summary["stage_seconds"].values()))
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert load_config(folder / "config.toml").actor.threads == 2
    logs = sorted(path.name for path in (folder / "logs").iterdir())
    names = ["actor-0", "eval-0", "eval-1", "hub-0", "learner-0", "warmup-0"]
    assert logs == [f"{name}.log" for name in names]
    threads = {path.name.rpartition("-")[0]: path.read_text() for path in (tmp_path / "pids").iterdir()}
    assert (threads["actor"], threads["learner"], threads["warmup"]) == ("2", "1", "3")
    assert "held-out success 0.40 after the warm start, 0.90 best" in shown
    assert (tmp_path / "outlived by").read_text() == "", "actors hand the hub their last work"
    assert not alive(tmp_path)


@pytest.mark.parametrize("role", ["hub", "learner", "warmup", "eval"])
def test_a_role_that_may_die_no_more_ends_the_run_with_its_last_words(tmp_path: Path, role: str) -> None:
    # Whoever might end before the dead role is noticed has to wait; of two evaluations either dies first.
    others = {"hub": {"learner": "wait"}, "eval": {}}.get(role, {"hub": "wait"})
    folder = plan(tmp_path, **{**others, role: "die"})
    with pytest.raises(RoleError) as caught:
        train(folder, settings=NO_RESTARTS)
    message = str(caught.value)
    pattern = rf"({role}-\d) ended with exit code 4; last lines of {folder}/logs/\1\.log:"
    assert re.search(pattern, message)
    assert "the disk is on fire" in message
    assert message.endswith(f"continue with: slipstream train --output {folder} --resume")
    assert not alive(tmp_path)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever dies of it cannot say so in a log on the same disk; the launcher's own files may fail too."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(supervisor.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    monkeypatch.setattr(launch.run_folder, "write_json", Mock(side_effect=full))
    folder = plan(tmp_path, learner="kill -9", hub="wait")
    with pytest.raises(RoleError, match=f"the disk of {folder} is full, free some space; it wrote nothing"):
        train(folder, settings=NO_RESTARTS)
    monkeypatch.setattr(launch.summary, "write_summary", Mock(side_effect=full))
    plan(tmp_path)
    with pytest.raises(StorageError, match=r"No space left on device; free space .*\ncontinue with: "):
        train(folder, resume=True, settings=NO_RESTARTS)


def test_a_killed_learner_is_named_with_its_signal(tmp_path: Path) -> None:
    folder = plan(tmp_path, learner="kill -9", hub="wait")
    log = folder / "logs" / "learner-0.log"
    with pytest.raises(RoleError, match=f"learner-0 was killed by SIGKILL .*; it wrote nothing into {log}\n"):
        train(folder, settings=NO_RESTARTS)
    assert not alive(tmp_path)


def test_last_words_are_not_those_of_an_earlier_process(tmp_path: Path) -> None:
    folder = plan(tmp_path, learner="die", hub="wait")
    with pytest.raises(RoleError, match="the disk is on fire"):
        train(folder, settings=NO_RESTARTS)
    plan(tmp_path, learner="kill -9", hub="wait")
    with pytest.raises(RoleError, match="it wrote nothing into"):
        train(folder, resume=True, settings=NO_RESTARTS)


@pytest.mark.parametrize("role", ["actor", "learner", "warmup"])
def test_a_users_mistake_found_by_a_role_stays_one_sentence(tmp_path: Path, role: str) -> None:
    folder = plan(tmp_path, **{"learner": "wait", "hub": "wait", role: "refuse"})
    with pytest.raises(UserError) as caught:
        train(folder)
    assert str(caught.value) == "model.path: no such folder /models/none; give another"
    assert starts(tmp_path, role) == 1
    assert not alive(tmp_path)


@pytest.mark.parametrize("role", ["hub", "learner", "actor", "warmup", "eval"])
def test_a_dead_role_is_started_again(tmp_path: Path, role: str) -> None:
    folder = plan(tmp_path, **{role: "die 1 times"})
    want(tmp_path, **{role: 2})
    shown = train(folder)
    assert re.search(rf"{role}-\d ended with exit code 4; restart 1 of 5 in 0.01\d* s", shown)
    assert starts(tmp_path, role) == 2
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["restarts"], summary["restarts_by_role"]) == (1, {role: 1})


@pytest.mark.parametrize(
    "role",
    [
        "learner",
        pytest.param("hub", marks=pytest.mark.slow),
        pytest.param("actor", marks=pytest.mark.slow),
        pytest.param("warmup", marks=pytest.mark.slow),
    ],
)
def test_a_role_that_keeps_dying_ends_the_run_after_five_restarts(tmp_path: Path, role: str) -> None:
    folder = plan(tmp_path, **{"learner": "wait", "hub": "wait", role: "die"})
    with pytest.raises(RoleError, match=f"{role}-0 ended with exit code 4 6 times"):
        train(folder)
    assert starts(tmp_path, role) == 6
    assert restarts_of(folder) == {role: 5}
    assert not alive(tmp_path)


def test_restarts_are_counted_over_resumes(tmp_path: Path) -> None:
    folder = plan(tmp_path, learner="die 2 times")
    with pytest.raises(RoleError):
        train(folder, settings=["supervision.restarts=1"])
    plan(tmp_path, actor="die 1 times")
    (tmp_path / "pids").rename(tmp_path / "earlier pids")
    want(tmp_path, actor=2)
    train(folder, resume=True, settings=["supervision.restarts=1"])
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["restarts"], summary["restarts_by_role"]) == (2, {"actor": 1, "learner": 1})


@pytest.mark.parametrize(
    "role",
    ["learner", pytest.param("hub", marks=pytest.mark.slow), pytest.param("actor", marks=pytest.mark.slow)],
)
def test_whoever_was_asked_to_stop_is_started_again_and_not_counted(tmp_path: Path, role: str) -> None:
    folder = plan(tmp_path, **{role: "be asked to stop 2 times"})
    want(tmp_path, **{role: 3})
    shown = train(folder, settings=NO_RESTARTS)
    assert shown.count(f"{role}-0 was asked to stop; restart in 0.01 s") == 2
    assert restarts_of(folder) == {role: 2}


def test_a_hub_that_ends_before_the_learner_is_started_again(tmp_path: Path) -> None:
    folder = plan(tmp_path, hub="end 1 times")
    want(tmp_path, hub=2)
    shown = train(folder, settings=NO_RESTARTS)
    assert "hub-0 was asked to stop; restart in 0.01 s" in shown
    assert restarts_of(folder) == {"hub": 1}


def test_numbers_that_are_none_are_not_tried_again(tmp_path: Path) -> None:
    folder = plan(tmp_path, learner="find no numbers", hub="wait")
    with pytest.raises(NumericsError) as caught:
        train(folder)
    assert (str(caught.value), caught.value.exit_code) == ("loss was not finite 5 steps in a row", 3)
    assert starts(tmp_path, "learner") == 1
    assert not alive(tmp_path)


def test_deaths_of_long_ago_are_forgotten(tmp_path: Path) -> None:
    folder = plan(tmp_path, warmup="die 7 times")
    patience = replace(PATIENCE, window_s=0.0)
    with pytest.raises(RoleError, match="warmup-0 ended with exit code 4 6 times"):
        train(folder, patience=patience)  # nothing got on between these deaths
    budget = RestartBudget(restarts=1, window_s=10.0)
    assert budget.spend(now=0.0, progress=1) is not None
    assert budget.spend(now=9.0, progress=2) is None
    assert budget.spend(now=20.0, progress=3) is not None


def test_pauses_double_up_to_a_minute_and_never_fall_together() -> None:
    budget = RestartBudget(restarts=20, backoff_s=0.5)
    pauses = [budget.spend(now=0.0, progress=None) or 0.0 for _ in range(20)]
    plain = [min(0.5 * 2**n, 60.0) for n in range(20)]
    assert (
        all(least <= pause <= 1.5 * least for least, pause in zip(plain, pauses, strict=True))
        and pauses != plain
    )
    assert budget.spend(now=0.0, progress=None) is None


def test_clients_follow_a_hub_that_comes_back_elsewhere(tmp_path: Path) -> None:
    folder = plan(tmp_path, hub="listen elsewhere each time", learner="wait 1 times")
    shown = train(folder, settings=["supervision.actor_restarts=0"])
    for role in ("actor-0", "learner-0"):
        assert f"{role} is started again: the hub has moved to tcp://127.0.0.1:2" in shown
    assert restarts_of(folder) == {"actor": 1, "hub": 1, "learner": 1}


def test_a_silent_hub_is_to_blame_for_the_death_of_its_client(tmp_path: Path) -> None:
    folder = plan(tmp_path, hub="fall silent 1 times", actor="give a silent hub up 1 times")
    want(tmp_path, actor=2)
    shown = train(folder, settings=["supervision.actor_restarts=0"], patience=replace(PATIENCE, blame_s=1.0))
    assert re.search(r"hub-0 gave no sign of life for \d+ s: killed; what it was doing: ", shown)
    assert "actor-0 ended with exit code 1; restart in 0.01 s" in shown
    assert restarts_of(folder) == {"actor": 1, "hub": 1}


def test_actors_are_called_back_when_the_learner_has_to_go_on(tmp_path: Path) -> None:
    """They had been told that training was over; the learner died before it was."""
    folder = plan(tmp_path, actor="end 1 times", learner="die when the actor has ended 1 times")
    want(tmp_path, actor=2)
    train(folder)
    assert starts(tmp_path, "actor") == starts(tmp_path, "learner") == 2


def test_an_actor_that_ends_behind_the_learners_restart_is_called_back_too(tmp_path: Path) -> None:
    """What it had been told came from the learner that died."""
    folder = plan(tmp_path, actor="end when the learner is there again 1 times", learner="die 1 times")
    want(tmp_path, actor=2)
    train(folder)
    assert starts(tmp_path, "actor") == starts(tmp_path, "learner") == 2


def test_an_actor_whose_hub_is_dead_is_not_waited_for(tmp_path: Path) -> None:
    folder = plan(tmp_path, hub="die when others are ready", actor="ignore SIGTERM", learner="wait")
    with pytest.raises(RoleError, match="hub-0 was killed by SIGKILL") as caught:
        train(folder, settings=NO_RESTARTS)
    assert not any("ignored SIGTERM" in note for note in caught.value.__notes__)
    assert not alive(tmp_path)


def test_a_role_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    folder = plan(tmp_path, actor="ignore SIGTERM", learner="work")
    shown = train(folder, patience=Patience(stop_s=0.25))
    assert re.search(r"actor-0 ignored SIGTERM for 0\.\d+ s: killed", shown)
    assert not alive(tmp_path)


def test_resume_keeps_a_sound_warm_start_and_makes_a_damaged_one_again(tmp_path: Path) -> None:
    folder = plan(tmp_path)
    train(folder)
    with pytest.raises(RunFolderError, match="add --resume"):
        train(folder)
    train(folder, resume=True)
    assert starts(tmp_path, "warmup") == 1
    (folder / "checkpoints" / "warmup" / "state.json").write_text("{}")
    shown = train(folder, resume=True)
    assert starts(tmp_path, "warmup") == 2
    assert "the warm start is made again" in shown and "state.json: expected" in shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_roles_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    folder = plan(tmp_path, learner="wait", hub="wait")
    command = [sys.executable, "-c", DRIVER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        wait_for(lambda: ready(tmp_path, "hub", "actor", "learner"), "the roles")
        driver.send_signal(number)
        shown, _ = driver.communicate(timeout=HANGS_S)
    assert driver.returncode == 130
    assert f"stopped by {number.name}; continue with: slipstream train --output {folder} --resume" in shown
    assert not alive(tmp_path)


class Interrupting(PlainScreen):
    """Asks this process to end when a stage begins."""

    def __init__(self, folder: Path, stage: str, number: signal.Signals, stream: io.StringIO) -> None:
        super().__init__(load_config("research"), folder, stream)
        self._wanted, self._number = stage, number

    def stage(self, name: str) -> None:
        super().stage(name)
        if name == self._wanted:
            signal.raise_signal(self._number)


@pytest.fixture
def signals_at_default() -> Iterator[None]:
    """Whoever runs the tests in the background lets them inherit signals that are ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("stage", ["warm start", "learning curve"])
@pytest.mark.usefixtures("signals_at_default")
def test_a_signal_while_no_role_runs_ends_the_run_likewise(
    tmp_path: Path, stage: str, number: signal.Signals
) -> None:
    folder, stream = plan(tmp_path), io.StringIO()
    screen = Interrupting(folder, stage, number, stream)
    code = launch.train(
        load_config("research"), folder, resume=False, serial=False, screen=screen, program=PROGRAM
    )
    assert code == 130
    assert f"stopped by {number.name}; continue with: slipstream train --output" in stream.getvalue()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_roles_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    folder = plan(tmp_path, learner="ignore SIGTERM", hub="ignore SIGTERM")
    command = [sys.executable, "-c", DRIVER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        wait_for(lambda: ready(tmp_path, "hub", "actor", "learner"), "the roles")
        assert len(alive(tmp_path)) == 3
        with pytest.raises(RunFolderError, match=f"is in use by process {driver.pid}"):
            train(folder, resume=True)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(timeout=HANGS_S)
        wait_for(lambda: not alive(tmp_path), "the roles to end")
    assert "warm start" in json.loads((folder / "times.json").read_text())


def test_a_role_that_falls_silent_is_killed_with_a_report(tmp_path: Path) -> None:
    folder = plan(tmp_path, learner="fall silent")
    with pytest.raises(RoleError, match="learner-0 was killed by SIGKILL") as caught:
        train(folder, settings=NO_RESTARTS, patience=replace(PATIENCE, stall_s=STALL_S))
    (told,) = (line for line in caught.value.__notes__[0].splitlines() if "no sign of life" in line)
    (report,) = (folder / "flight").glob("learner-0-*.stall")
    assert str(report) in told
    text = report.read_text()
    assert "a word that never comes" in text and "the last thing it did" in text
    assert "in wait_for_signal" in text


@pytest.mark.parametrize(
    "role",
    [
        "learner",
        pytest.param("hub", marks=pytest.mark.slow),
        pytest.param("actor", marks=pytest.mark.slow),
        pytest.param("warmup", marks=pytest.mark.slow),
        pytest.param("eval", marks=pytest.mark.slow),
    ],
)
def test_a_silent_role_is_started_again(tmp_path: Path, role: str) -> None:
    folder = plan(tmp_path, **{role: "fall silent 1 times"})
    want(tmp_path, **{role: 2})
    shown = train(folder, patience=replace(PATIENCE, stall_s=STALL_S))
    assert re.search(rf"{role}-\d gave no sign of life for \d+ s: killed; ", shown)
    assert restarts_of(folder)[role] >= 1


SILENT = """
import sys
from pathlib import Path
from slipstream.flight_recorder import FLIGHT
FLIGHT.start(Path(sys.argv[1]))
print("ready", flush=True)
input()
"""


def test_a_launcher_that_stood_still_itself_blames_nobody(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SILENT, str(tmp_path / "flight" / "hub-0.ring")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        spec, budget = supervisor.RoleSpec(role="hub", arguments=()), RestartBudget(restarts=0)
        patience, began = replace(PATIENCE, stall_s=0.5), time.monotonic()
        watch = supervisor.Supervisor(
            folder=tmp_path, program=(), on_event=Mock(), on_tick=Mock(), patience=patience
        )
        watch._roles.append(supervisor._Running(spec=spec, budget=budget, process=process))
        wait_for(lambda: time.monotonic() > began + patience.stall_s, "the silence to be long enough")
        watch._next_look = time.monotonic() - 600.0
        watch._end_stalls()
        assert process.poll() is None
        watch._next_look = time.monotonic()
        watch._end_stalls()
        assert process.wait(HANGS_S) == -signal.SIGKILL
