"""The hub as a process: killed in mid-stream, started again, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slipstream import config as configuration
from slipstream import events, hub, synthetic
from slipstream import messages as m
from slipstream.config import BatchConfig, EvaluationConfig, HubConfig, RunConfig
from slipstream.deadlines import Deadline, Deadlines
from slipstream.errors import AddressError
from slipstream.ingest import read_events
from slipstream.rendezvous import hub_address, run_id
from slipstream.spool import Spool
from slipstream.stop_signals import STOPPED
from slipstream.transport.client import ActorClient, LearnerClient
from slipstream.transport.zeromq import DealerChannel, SyncDealerChannel
from slipstream.wire import decode_trajectory

CONFIG = RunConfig(
    steps=100,
    max_slip=8,
    batch=BatchConfig(groups=8, group_size=4),
    evaluation=EvaluationConfig(every=100, tasks=1),
)
LOG = "trajectories"
HANGS_S = 100.0
"""Far above what anything takes: it only ends tests that hang."""
QUICK = Deadlines(ping_s=0.1, silence_s=HANGS_S, credit_s=HANGS_S, drain_s=HANGS_S)
PROGRAM = (
    "import sys; from pathlib import Path; from slipstream import config, hub; "
    "folder = Path(sys.argv[1]); sys.exit(hub.main(config.read(folder / 'config.toml'), folder))"
)


@contextlib.contextmanager
def hub_process(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a hub and wait until it listens."""
    folder.mkdir(exist_ok=True)
    configuration.save(CONFIG, folder / "config.toml")
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder)])
    deadline = Deadline(HANGS_S, "test", "the hub to listen")
    while listening_pid(folder) != process.pid:
        deadline.check()
        assert process.poll() is None
        time.sleep(0.01)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def listening_pid(folder: Path) -> int:
    try:
        return int(json.loads((folder / "hub.json").read_text()).get("pid", -1))
    except FileNotFoundError:
        return -1


def test_stops_cleanly_and_writes_what_it_knows(tmp_path: Path) -> None:
    with hub_process(tmp_path) as process:
        address = hub_address(tmp_path)
        learner = LearnerClient(SyncDealerChannel(address), run_id(tmp_path), "learner", deadlines=QUICK)
        learner.connect(0)
        learner.publish(synthetic.update(0, step=0))
        learner.report("train", {"step": 3, "loss": 0.5})
        while not (tmp_path / "metrics.jsonl").exists():  # whoever closes takes along what is on its way
            assert learner.pull(0, 0.05) is None
        learner.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANGS_S) == STOPPED, "the run is not done"
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (row["step"], row["loss"], row["hub/made"]) == (3, 0.5, 0)
    assert row["time"] > 0
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["version"] == 0
    assert status["gate_room"] == (CONFIG.max_slip + 1) * CONFIG.batch.groups
    assert [type(e.event) for e in read_events(tmp_path / "trajectories")] == [
        events.Incarnation,
        events.Published,
    ]


def test_a_disk_that_is_nearly_full_pauses_the_leases_until_there_is_room(tmp_path: Path) -> None:
    log, ledger = hub.open_ledger(CONFIG, tmp_path, "run")
    books = hub.Bookkeeper(ledger, log, tmp_path, HubConfig(reserve_bytes=1 << 60))
    books.turn()
    assert ledger.paused
    books = hub.Bookkeeper(ledger, log, tmp_path, HubConfig(reserve_bytes=0))
    books.turn()
    assert not ledger.paused
    log.close()


def test_the_status_of_a_hub_that_died_behind_the_end_is_that_of_its_log(tmp_path: Path) -> None:
    with hub_process(tmp_path) as process:
        channel = SyncDealerChannel(hub_address(tmp_path))
        learner = LearnerClient(channel, run_id(tmp_path), "learner", deadlines=QUICK)
        learner.connect(0)
        learner.publish(synthetic.update(0, step=7))
        assert learner.pull(0, 0.0) is None
        while not any(isinstance(entry.event, events.Published) for entry in read_events(tmp_path / LOG)):
            assert learner.pull(0, 0.05) is None
        learner.close()
        process.kill()
    (tmp_path / "status.json").unlink()
    hub.settle(CONFIG, tmp_path)
    assert json.loads((tmp_path / "status.json").read_text())["version"] == 7
    with pytest.raises(AddressError, match="the run is done"):
        hub_address(tmp_path)


def test_never_imports_torch(tmp_path: Path) -> None:
    code = "import sys, slipstream.hub; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("kills", [3])
def test_kill_9_in_mid_stream_loses_nothing_and_doubles_nothing(tmp_path: Path, kills: int) -> None:
    asyncio.run(asyncio.wait_for(stream_through_kills(tmp_path, kills), HANGS_S))
    received = [
        entry for entry in read_events(tmp_path / "trajectories") if isinstance(entry.event, events.Received)
    ]
    identities = [entry.event.identity for entry in received if isinstance(entry.event, events.Received)]
    attempts = [
        entry.event.attempt
        for entry in received
        if isinstance(entry.event, events.Received) and entry.event.verdict == "buffered"
    ]
    made = set((tmp_path / "made").read_text().split())
    assert len(identities) == len(set(identities))
    assert len(attempts) == len(set(attempts))
    # What a trajectory says of itself is what its maker wrote down before sending it.
    assert {
        f"{t.attempt.group}.{t.attempt.attempt}" for t in (decode_trajectory(e.record) for e in received)
    } == made
    assert len(made) == (CONFIG.max_slip + 1) * CONFIG.batch.trajectories


async def stream_through_kills(folder: Path, kills: int) -> None:
    total = (CONFIG.max_slip + 1) * CONFIG.batch.trajectories
    with contextlib.ExitStack() as stack, (folder / "made").open("w") as made:
        process = stack.enter_context(hub_process(folder))
        learner = LearnerClient(
            SyncDealerChannel(hub_address(folder)), run_id(folder), "learner", deadlines=QUICK
        )
        learner.connect(0)
        announced = synthetic.update(0, step=0)
        learner.publish(announced)
        spool = Spool(folder / "a.spool")
        actor = ActorClient(DealerChannel(hub_address(folder)), spool, run_id(folder), "a", deadlines=QUICK)
        await actor.connect()
        await actor.prove(synthetic.proof(announced))
        await actor.want(8, 0)
        done = 0
        while done < total:
            word = await actor.receive()
            for lease in word.leases if isinstance(word, m.Grant) else ():
                made.write(f"{lease.attempt.group}.{lease.attempt.attempt}\n")
                await actor.send(synthetic.answer_to(lease, serial=0, tokens=2048, seed=done))
                done += 1
                if done % (total // (kills + 1)) == 0 and done < total:
                    process.kill()
                    process.wait()
                    process = stack.enter_context(hub_process(folder))
            await actor.want(8, 0)
        await actor.drain()
        await actor.close()
        learner.close()
        assert not (folder / "a.spool").exists()
