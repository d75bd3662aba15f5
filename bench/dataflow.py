"""Hub and wire alone: checked, logged, acknowledged trajectories against plain pyzmq, in the same run.

    python bench/dataflow.py [--rounds N] [--curve] [--json FILE] [--folder FOLDER]

Two sending processes and one receiving process on this machine, over TCP, with synthetic trajectories of
64 KB and 1 MB:

    slipstream   ActorClient (encoded, spooled) to the real hub process (checked, logged, acknowledged)
    acked        the same messages and window through blocking DEALER and ROUTER sockets; the receiver looks
                 at nothing, keeps nothing, and acknowledges what it took in each turn: the target
    unacked      the same bytes as one frame, acknowledged once at the very end
    curve        with --curve: slipstream with keys, every byte encrypted

Spools and log are in a temporary folder, as a run's are on a disk; --folder takes another place, such as
/dev/shm. Rounds of the three take turns; medians are reported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import uvloop
import zmq

from slipstream import config as configuration
from slipstream import hub, synthetic
from slipstream import messages as m
from slipstream.config import BatchConfig, EvaluationConfig, HubConfig, RunConfig
from slipstream.deadlines import Deadline
from slipstream.keys import client_keys, make_keys
from slipstream.process import keep_freed_memory
from slipstream.rendezvous import hub_address, run_id
from slipstream.run_folder import read_json
from slipstream.spool import Spool
from slipstream.transport.client import ActorClient, LearnerClient
from slipstream.transport.zeromq import (
    HIGH_WATER,
    DealerChannel,
    SyncDealerChannel,
    receive_frames,
    send_frames,
)
from slipstream.wire import encode_trajectory

ACTORS: Final = 2
GROUP: Final = 8
SIZES: Final = {"64 KB": (64 << 10, 2000), "1 MB": (1 << 20, 160)}
"""name -> (bytes of a trajectory, trajectories of each actor)."""
TARGET: Final = 0.7
WINDOW: Final = HubConfig().credit_bytes
TURN: Final = 128
"""Messages that the acknowledging receiver takes in one turn, as the hub does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Medians for one size; ratios are medians of the ratios of neighbouring rounds."""

    size: str
    slipstream_mb_s: float
    plain_mb_s: float
    """The acked way."""
    unacked_mb_s: float
    ratio: float
    """slipstream / acked: the target."""
    ratio_to_unacked: float
    curve_mb_s: float
    """0 unless it was asked for."""
    ratio_of_curve: float
    """curve / slipstream: what is left of the throughput."""
    slipstream_per_s: float
    rounds: int


def run(rounds: int = 5, folder: Path | None = None, *, curve: bool = False) -> dict[str, Any]:
    """Measure, print a table, and return the figures."""
    home = folder or Path(tempfile.gettempdir())
    rows = [measure(name, *size, rounds=rounds, home=home, curve=curve) for name, size in SIZES.items()]
    encode_ms = encode_milliseconds()
    say(f"{ACTORS} actors, spools and log under {home}, {rounds} rounds")
    encrypted = f"{'curve':>14}{'ratio':>8}" if curve else ""
    say(
        f"{'trajectory':<12}{'slipstream':>14}{'acked pyzmq':>14}{'ratio':>8}{'unacked':>14}{'ratio':>8}"
        + encrypted
    )
    for row in rows:
        say(
            f"{row.size:<12}{row.slipstream_mb_s:>9.0f} MB/s{row.plain_mb_s:>9.0f} MB/s{row.ratio:>8.2f}"
            f"{row.unacked_mb_s:>9.0f} MB/s{row.ratio_to_unacked:>8.2f}"
            + (f"{row.curve_mb_s:>9.0f} MB/s{row.ratio_of_curve:>8.2f}" if curve else "")
        )
    say(f"target: first ratio >= {TARGET}")
    say(f"encoding a 32,768-token trajectory: {encode_ms:.3f} ms   target <= 1 ms")
    return {
        "rows": [asdict(row) for row in rows],
        "encode_32768_tokens_ms": encode_ms,
        "actors": ACTORS,
        "window_bytes": WINDOW,
        "storage": str(folder or "temporary folder"),
        "machine": {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "pyzmq": zmq.pyzmq_version(),
            "libzmq": zmq.zmq_version(),
        },
    }


def measure(name: str, size: int, count: int, *, rounds: int, home: Path, curve: bool) -> Row:
    """Let all take turns for some rounds after one that does not count."""
    taken = [
        (
            slipstream_seconds(size, count, home),
            plain_seconds("acked", size, count),
            plain_seconds("unacked", size, count),
            slipstream_seconds(size, count, home, curve=True) if curve else math.inf,
        )
        for _ in range(rounds + 1)
    ][1:]
    megabytes = ACTORS * count * size / 1e6
    ours, acked, unacked, encrypted = (statistics.median(seconds) for seconds in zip(*taken, strict=True))
    return Row(
        size=name,
        slipstream_mb_s=megabytes / ours,
        plain_mb_s=megabytes / acked,
        unacked_mb_s=megabytes / unacked,
        ratio=statistics.median(theirs / mine for mine, theirs, _, _ in taken),
        ratio_to_unacked=statistics.median(theirs / mine for mine, _, theirs, _ in taken),
        curve_mb_s=megabytes / encrypted,
        ratio_of_curve=statistics.median(mine / curved for mine, _, _, curved in taken),
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


def slipstream_seconds(size: int, count: int, home: Path, *, curve: bool = False) -> float:
    """Return the time from the first send to the last acknowledgement, through a fresh hub."""
    with tempfile.TemporaryDirectory(dir=home) as name:
        folder = Path(name)
        keys = str(folder / "keys") if curve else ""
        if curve:
            make_keys(
                folder / "keys", {"learner-0": "learner", **{f"actor-{n}": "actor" for n in range(ACTORS)}}
            )
        groups = ACTORS * count // GROUP
        config = RunConfig(
            steps=1,
            batch=BatchConfig(groups=groups, group_size=GROUP),
            evaluation=EvaluationConfig(every=2, tasks=1),
            hub=HubConfig(keys=keys),
        )
        configuration.save(config, folder / "config.toml")
        receiver = spawn("hub", str(folder))
        try:
            deadline = Deadline(30.0, "bench", "the hub to listen")
            while "address" not in read_json(folder / "hub.json"):
                deadline.check()
                time.sleep(0.01)
            channel = SyncDealerChannel(hub_address(folder), client_keys(keys, "learner-0"))
            learner = LearnerClient(channel, run_id(folder), "learner-0")
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


def plain_seconds(way: str, size: int, count: int) -> float:
    """Return the same time for plain pyzmq."""
    receiver = spawn(f"{way}-receiver", str(ACTORS * count))
    try:
        address = line_of(receiver)
        return race([spawn(f"{way}-sender", address, str(size), str(count)) for _ in range(ACTORS)])
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
    keep_freed_memory()
    uvloop.run(act(Path(folder), name, int(size), int(count)))


async def act(folder: Path, name: str, size: int, count: int) -> None:
    """Be one actor."""
    spool = Spool(folder / f"{name}.spool")
    keys = configuration.read(folder / "config.toml").hub.keys
    channel = DealerChannel(hub_address(folder), client_keys(keys, name))
    client = ActorClient(channel, spool, run_id(folder), name)
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


def part_acked_receiver(count: str) -> None:
    """Receive everything in turns; after each turn tell each sender how much of it came from there."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.set_hwm(HIGH_WATER)
        say(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}")
        left = int(count)
        while left:
            socket.poll()
            taken: Counter[bytes] = Counter()
            with contextlib.suppress(zmq.Again):
                for _ in range(TURN):
                    taken[bytes(receive_frames(socket)[0])] += 1
            for peer, number in taken.items():
                socket.send_multipart([peer, number.to_bytes(4, "little")])
            left -= taken.total()
        sys.stdin.readline()


def part_acked_sender(address: str, size: str, count: str) -> None:
    """Send the same frames, at most a window of bytes ahead of the acknowledgements."""
    tokens = int(size) // synthetic.BYTES_PER_TOKEN
    # As many different ones as the actor sends: a single one would never leave the processor's cache.
    messages = [
        [m.encode_message(m.Deliver(seq=seq)), encode_trajectory(synthetic.trajectory(tokens, seed=seq))]
        for seq in range(int(count))
    ]
    most = max(1, WINDOW // sum(map(len, messages[0])))
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.set_hwm(HIGH_WATER)
        socket.connect(address)
        say("ready")
        sys.stdin.readline()
        ahead = 0
        while messages or ahead:
            if messages and ahead < most:
                socket.poll(flags=zmq.POLLOUT)
                send_frames(socket, messages.pop())
                ahead += 1
            while ahead and socket.poll(0 if messages and ahead < most else None):
                ahead -= int.from_bytes(socket.recv(), "little")
        say("done")
        sys.stdin.readline()


def part_unacked_receiver(count: str) -> None:
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


def part_unacked_sender(address: str, size: str, count: str) -> None:
    """Send the same bytes as one frame each."""
    tokens = int(size) // synthetic.BYTES_PER_TOKEN
    records = [encode_trajectory(synthetic.trajectory(tokens, seed=seq)) for seq in range(int(count))]
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(address)
        say("ready")
        sys.stdin.readline()
        for record in records:
            socket.send(record, copy=False)
        socket.recv()
        say("done")
        sys.stdin.readline()


def main() -> int:
    """Run the benchmark, or one part of it in a process of its own."""
    parser = argparse.ArgumentParser(description="Hub and wire against plain pyzmq.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--curve", action="store_true", help="also with keys, everything encrypted")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where spools and log lie")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    parts = {"hub": part_hub, "actor": part_actor, "acked-receiver": part_acked_receiver,
             "acked-sender": part_acked_sender, "unacked-receiver": part_unacked_receiver,
             "unacked-sender": part_unacked_sender}  # fmt: skip
    if chosen.part:
        parts[chosen.part[0]](*chosen.part[1:])
        return 0
    figures = run(chosen.rounds, chosen.folder, curve=chosen.curve)
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
