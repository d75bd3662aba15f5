"""Whole runs that sample from a vLLM server which `slipstream serve` keeps."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from books import read_rows, rows_of
from runs import Run, make_warm_start, until

from slipstream import events
from slipstream.audit import audit
from slipstream.ingest import read_events
from slipstream.launch import INTERRUPTED
from slipstream.run_folder import read_json
from slipstream.wire import inspect_trajectory

PROGRAM = os.environ.get("SLIPSTREAM_VLLM", "")
SETTINGS = (
    "model.heads=1",  # of 32 numbers: vLLM on a CPU has attention for no smaller ones
    "inference.backend=vllm",
    f"inference.program={PROGRAM}",
    "evaluation.final_tasks=4",
)
PATIENCE_S = 900.0
"""A server takes a minute to start, several on a machine that has other work."""


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_warm_start(tmp_path_factory.mktemp("warm"), "model.heads=1")


@pytest.fixture
def run(tmp_path: Path, warm: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    shutil.copytree(warm, tmp_path / "run")
    yield Run(tmp_path / "run", (*SETTINGS, *getattr(request, "param", ())))


def servers_of(folder: Path) -> list[psutil.Process]:
    """Return the processes of vLLM that serve a run folder's model."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if str(folder / "checkpoints" / "warmup") in command and "serve" in command:
            found.append(process)
    return found


@pytest.mark.parametrize("run", [("steps=5", "max_slip=0", "optim.minibatches=1")], indirect=True)
def test_the_learner_agrees_with_what_the_server_sampled(run: Run) -> None:
    """At slip 0 nothing but rounding lies between the server's log-probabilities and the learner's."""
    ended = run.start().end(PATIENCE_S)
    assert ended.code == 0, ended.err
    rows = rows_of(read_rows(run.folder), "train")
    assert len(rows) == 5
    assert max(abs(row["mismatch/k3"]) for row in rows) < 1e-7
    assert max(row["slip/max"] for row in rows) == 0
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["trajectories"] == 5 * 16
    assert (summary["lost"], summary["doubled"]) == (0, 0)
    books = read_json(run.folder / "status.json")["books"]
    assert books["trained"] == 5 * 16
    assert books["unproven"] == 0
    assert servers_of(run.folder) == []


@pytest.mark.parametrize("run", [("steps=100000",)], indirect=True)
def test_a_killed_server_costs_nothing_but_time_and_check_says_what_serves(run: Run) -> None:
    """SIGKILL of vLLM in the middle: its requests wait for its next life, which proves its weights anew."""
    process = run.start()

    def steps() -> int:
        return len(rows_of(read_rows(run.folder), "train"))

    until(lambda: steps() >= 2, "two steps", PATIENCE_S)
    killed = servers_of(run.folder)
    assert killed
    for each in killed:
        each.send_signal(signal.SIGKILL)
    log = run.folder / "logs" / "serve-0.log"
    until(lambda: log.read_text().count(" serves as serve-0/0#") == 2, "another life", PATIENCE_S)
    before = steps()
    until(lambda: steps() >= before + 3, "steps from that life", PATIENCE_S)
    checked = run.command("serve", "--check").end(PATIENCE_S)
    assert checked.code == 0, checked.out + checked.err
    assert checked.out.startswith("serve-0/0 is serve-0/0#")
    assert "proven anew" in checked.out
    process.signal(signal.SIGTERM)
    assert process.end(PATIENCE_S).code == INTERRUPTED
    assert "Traceback" not in log.read_text()
    assert audit(run.folder).findings == ()
    # Tokens of weights that the killed server had taken and could not prove any more; no others.
    first_life = re.findall(r" serves as (\S+)", log.read_text())[0]
    for entry in read_events(run.folder / "trajectories"):
        if isinstance(entry.event, events.Received) and entry.event.verdict == "unproven":
            samplers = inspect_trajectory(entry.record).header.samplers
            assert first_life in {server for server, _ in samplers}
    assert servers_of(run.folder) == []


def test_a_head_size_that_vllm_lacks_is_one_sentence(tmp_path: Path) -> None:
    make_warm_start(tmp_path)
    run = Run(tmp_path, SETTINGS[1:])
    sentence = run.start().end(PATIENCE_S).sentence
    assert "model.heads: on a CPU vLLM has attention for heads of 32, " in sentence
    assert "got 16" in sentence


def test_a_program_that_is_not_there_is_one_sentence(tmp_path: Path, warm: Path) -> None:
    shutil.copytree(warm, tmp_path / "run")
    run = Run(tmp_path / "run", (*SETTINGS, "inference.program=no-such-vllm"))
    sentence = run.start().end(PATIENCE_S).sentence
    assert 'expected a program, got "no-such-vllm"' in sentence
