"""Hub and wire alone: acknowledged, logged trajectories against plain pyzmq, in the same run.

    python bench/dataflow.py [--rounds N] [--json FILE]

Two actor processes send synthetic trajectories of 64 KB and 1 MB to one receiving process, over TCP on
this machine:
"slipstream" through ActorClient (spool on disk) to the real hub process (checked, logged, acknowledged);
"plain" as one
frame of the same bytes through a DEALER to a ROUTER that throws it away. Rounds alternate; medians are
reported.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import zmq

from slipstream import config as configuration
from slipstream import hub, synthetic
from slipstream import messages as m
from slipstream.config import BatchConfig, EvaluationConfig, HubConfig, RunConfig
from slipstream.deadlines import Deadline
from slipstream.rendezvous import hub_address, run_id
from slipstream.run_folder import read_json
from slipstream.spool import Spool
from slipstream.transport.client import ActorClient, LearnerClient
from slipstream.transport.zeromq import DealerChannel, SyncDealerChannel
from slipstream.wire import encode_trajectory, to_bytes

ACTORS: Final = 2
GROUP: Final = 8
SIZES: Final = {"64 KB": (64 << 10, 2000), "1 MB": (1 << 20, 160)}
"""name -> (bytes of a trajectory, trajectories of each actor)."""
TARGET: Final = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Medians for one size."""

    size: str
    slipstream_mb_s: float
    plain_mb_s: float
    ratio: float
    """Median of the ratios of neighbouring rounds."""
    slipstream_per_s: float
    rounds: int


def run(rounds: int = 5) -> dict[str, Any]:
    """Measure, print a table, and return the figures."""
    rows = [measure(name, *size, rounds=rounds) for name, size in SIZES.items()]
    encode_ms = encode_milliseconds()
    out = sys.stdout
    out.write(f"{'trajectory':<12}{'slipstream':>14}{'plain pyzmq':>14}{'ratio':>8}   target >= {TARGET}\n")
    for row in rows:
        out.write(
            f"{row.size:<12}{row.slipstream_mb_s:>9.0f} MB/s{row.plain_mb_s:>9.0f} MB/s{row.ratio:>8.2f}\n"
        )
    out.write(f"encoding a 32,768-token trajectory: {encode_ms:.3f} ms   target <= 1 ms\n")
    return {"rows": [asdict(row) for row in rows], "encode_32768_tokens_ms": encode_ms, "actors": ACTORS}


def measure(name: str, size: int, count: int, *, rounds: int) -> Row:
    """Alternate both ways for some rounds after one that does not count."""
    pairs = [(slipstream_seconds(size, count), plain_seconds(size, count)) for _ in range(rounds + 1)][1:]
    megabytes = ACTORS * count * size / 1e6
    ours = statistics.median(pair[0] for pair in pairs)
    return Row(
        size=name,
        slipstream_mb_s=megabytes / ours,
        plain_mb_s=megabytes / statistics.median(pair[1] for pair in pairs),
        ratio=statistics.median(plain / mine for mine, plain in pairs),
        slipstream_per_s=ACTORS * count / ours,
        rounds=rounds,
    )


def encode_milliseconds() -> float:
    """Return the median time to encode a 32,768-token trajectory."""
    made = synthetic.trajectory(32_768)
    times = []
    for _ in range(200):
        started = time.perf_counter()
        encode_trajectory(made)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def slipstream_seconds(size: int, count: int) -> float:
    """Return the time from the first send to the last acknowledgement, through a fresh hub."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        groups = ACTORS * count // GROUP
        config = RunConfig(
            steps=1,
            batch=BatchConfig(groups=groups, group_size=GROUP),
            evaluation=EvaluationConfig(every=2, tasks=1),
            hub=HubConfig(),
        )
        configuration.save(config, folder / "config.toml")
        receiver = spawn("hub", str(folder))
        try:
            deadline = Deadline(30.0, "bench", "the hub to listen")
            while "address" not in read_json(folder / "hub.json"):
                deadline.check()
                time.sleep(0.01)
            learner = LearnerClient(SyncDealerChannel(hub_address(folder)), run_id(folder), "learner")
            learner.connect(0)
            learner.publish(synthetic.update(0, step=0))
            senders = [
                spawn("actor", str(folder), f"actor-{n}", str(size), str(count)) for n in range(ACTORS)
            ]
            seconds = race(senders)
            learner.close()
        finally:
            stop(receiver)
        return seconds


def plain_seconds(size: int, count: int) -> float:
    """Return the same time for plain pyzmq."""
    receiver = spawn("plain-receiver", str(ACTORS * count))
    try:
        address = line_of(receiver)
        return race([spawn("plain-sender", address, str(size), str(count)) for _ in range(ACTORS)])
    finally:
        stop(receiver)


def race(senders: list[subprocess.Popen[str]]) -> float:
    """Start all senders together and return the seconds until the last has finished."""
    for sender in senders:
        assert line_of(sender) == "ready"
    started = time.perf_counter()
    for sender in senders:
        tell(sender)
    for sender in senders:
        assert line_of(sender) == "done"
    seconds = time.perf_counter() - started
    for sender in senders:
        sender.communicate(timeout=10)
    return seconds


def spawn(*arguments: str) -> subprocess.Popen[str]:
    """Start this file in a part of the benchmark."""
    command = [sys.executable, __file__, "--part", *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    """Return the next line a part prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    """Let a part go on."""
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def stop(process: subprocess.Popen[str]) -> None:
    """End a part and release its pipes."""
    process.terminate()
    process.communicate(timeout=10)


def say(word: str) -> None:
    """Print one line at once."""
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


def part_hub(folder: str) -> None:
    """Run the real hub."""
    sys.exit(hub.main(configuration.read(Path(folder) / "config.toml"), Path(folder)))


def part_actor(folder: str, name: str, size: str, count: str) -> None:
    """Send `count` trajectories of `size` bytes, each for a lease, and wait for the last acknowledgement."""
    asyncio.run(act(Path(folder), name, int(size), int(count)))


async def act(folder: Path, name: str, size: int, count: int) -> None:
    """Be one actor."""
    spool = Spool(folder / f"{name}.spool")
    client = ActorClient(DealerChannel(hub_address(folder)), spool, run_id(folder), name)
    welcome = await client.connect()
    assert welcome.update is not None
    await client.prove(synthetic.proof(welcome.update))
    await client.want(count, 0)
    leases = []
    while len(leases) < count:
        word = await client.receive()
        leases += word.leases if isinstance(word, m.Grant) else ()
    tokens = size // synthetic.BYTES_PER_TOKEN
    made = [synthetic.answer_to(lease, serial=0, tokens=tokens) for lease in leases[:count]]
    say("ready")
    sys.stdin.readline()
    for trajectory in made:
        await client.send(trajectory)
    await client.drain(60.0)
    say("done")
    sys.stdin.readline()


def part_plain_receiver(count: str) -> None:
    """Receive everything, then tell each sender."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        say(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}")
        peers = set()
        for _ in range(int(count)):
            peer, _frame = socket.recv_multipart(copy=False)
            peers.add(peer.bytes)
        for peer in peers:
            socket.send_multipart([peer, b"done"])
        sys.stdin.readline()


def part_plain_sender(address: str, size: str, count: str) -> None:
    """Send the same bytes as one frame each."""
    record = to_bytes(synthetic.trajectory(int(size) // synthetic.BYTES_PER_TOKEN))
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(address)
        say("ready")
        sys.stdin.readline()
        for _ in range(int(count)):
            socket.send(record, copy=False)
        socket.recv()
        say("done")
        sys.stdin.readline()


def main() -> int:
    """Run the benchmark, or one part of it in a process of its own."""
    parser = argparse.ArgumentParser(description="Hub and wire against plain pyzmq.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", nargs="+")
    chosen = parser.parse_args()
    parts = {"hub": part_hub, "actor": part_actor, "plain-receiver": part_plain_receiver,
             "plain-sender": part_plain_sender}  # fmt: skip
    if chosen.part:
        parts[chosen.part[0]](*chosen.part[1:])
        return 0
    figures = run(chosen.rounds)
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
