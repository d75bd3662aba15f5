"""Hub and wire alone: checked, logged, acknowledged trajectories against plain pyzmq, in the same run.

    python bench/dataflow.py [--rounds N] [--json FILE] [--folder FOLDER]

Two sending processes and one receiving process on this machine, over TCP, with synthetic trajectories of
64 KB and 1 MB:

    slipstream   ActorClient (encoded, spooled) to the real hub process (checked, logged, acknowledged)
    power        the same with durability = "power": synced at both ends before it counts
    curve        the same as slipstream with keys, every byte encrypted
    acked        the same messages and window through blocking DEALER and ROUTER sockets; the receiver looks
                 at nothing, keeps nothing, and acknowledges what it took in each turn
    synced       the same, but the receiver first writes what it took into a file and syncs it
    unacked      the same bytes as one frame, acknowledged once at the very end

Spools and log are in a temporary folder, as a run's are on a disk; --folder takes another place, such as
/dev/shm. Rounds of all ways take turns; medians are reported.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import _plain_wire as plain
import uvloop
import zmq
from _parts import line_of, race, say, spawn, stop
from _plain_wire import WINDOW

from slipstream import config as configuration
from slipstream import hub, synthetic
from slipstream import messages as m
from slipstream.config import BatchConfig, EvaluationConfig, HubConfig, RunConfig
from slipstream.deadlines import Deadline
from slipstream.keys import client_keys, make_keys
from slipstream.process import collect_garbage_seldom, keep_freed_memory
from slipstream.rendezvous import hub_address, run_id
from slipstream.run_folder import read_json
from slipstream.spool import Spool
from slipstream.transport.client import ActorClient, LearnerClient
from slipstream.transport.zeromq import DealerChannel, SyncDealerChannel
from slipstream.wire import encode_trajectory

Durability = Literal["process", "power"]
ACTORS: Final = 2
GROUP: Final = 8
SIZES: Final = {"64 KB": (64 << 10, 2000), "1 MB": (1 << 20, 160)}
"""name -> (bytes of a trajectory, trajectories of each actor)."""
TARGETS: Final[dict[str, dict[str, float]]] = {
    "slipstream / acked": {"64 KB": 0.8, "1 MB": 0.8},
    "power / synced": {"64 KB": 0.6, "1 MB": 0.45},
    "power / acked": {},
    "curve / slipstream": {},
    "slipstream / unacked": {},
}
"""Ratios of throughput, with what is wanted of some."""
LIVE: Final = 64
"""Episodes of an actor that end at about the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Medians for one size; ratios are medians of the ratios of neighbouring rounds."""

    size: str
    mb_s: dict[str, float]
    """Way -> MB/s."""
    ratios: dict[str, float]
    """"a / b" -> throughput of way a over that of way b."""
    per_s: float
    """Trajectories of the way slipstream."""
    rounds: int


def run(rounds: int = 5, folder: Path | None = None) -> dict[str, Any]:
    """Measure, print a table, and return the figures."""
    home = folder or Path(tempfile.gettempdir())
    rows = [measure(name, *size, rounds=rounds, home=home) for name, size in SIZES.items()]
    encode_ms = encode_milliseconds()
    say(f"{ACTORS} actors, spools and log under {home}, {rounds} rounds")
    say(f"{'MB/s':<12}" + "".join(f"{way:>12}" for way in WAYS))
    for row in rows:
        say(f"{row.size:<12}" + "".join(f"{row.mb_s[way]:>12.0f}" for way in WAYS))
    for row in rows:
        for name, target in TARGETS.items():
            wanted = f"   target >= {target[row.size]}" if target else ""
            say(f"{row.size:<8}{name:<24}{row.ratios[name]:>6.2f}{wanted}")
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


def measure(name: str, size: int, count: int, *, rounds: int, home: Path) -> Row:
    """Let all ways take turns for some rounds after one that does not count."""
    taken = [{way: go(size, count, home) for way, go in WAYS.items()} for _ in range(rounds + 1)][1:]
    megabytes = ACTORS * count * size / 1e6
    mb_s = {way: megabytes / statistics.median(seconds[way] for seconds in taken) for way in WAYS}
    ratios = {}
    for ratio in TARGETS:
        one, other = ratio.split(" / ")
        ratios[ratio] = statistics.median(seconds[other] / seconds[one] for seconds in taken)
    per_s = 1e6 * mb_s["slipstream"] / size
    return Row(size=name, mb_s=mb_s, ratios=ratios, per_s=per_s, rounds=rounds)


def encode_milliseconds() -> float:
    """Return the median time to encode a 32,768-token trajectory."""
    made = synthetic.trajectory(32_768)
    times = []
    for _ in range(200):
        started = time.perf_counter()
        encode_trajectory(made)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def slipstream_seconds(
    size: int, count: int, home: Path, *, durability: Durability = "process", curve: bool = False
) -> float:
    """Return the time from the first send to the last acknowledgement, through a fresh hub."""
    with tempfile.TemporaryDirectory(dir=home) as name:
        folder = Path(name)
        keys = str(folder / "keys") if curve else ""
        if curve:
            clients = {f"actor-{n}": "actor" for n in range(ACTORS)}
            make_keys(folder / "keys", {"learner-0": "learner", **clients})
        config = RunConfig(
            steps=1,
            batch=BatchConfig(groups=ACTORS * count // GROUP, group_size=GROUP),
            evaluation=EvaluationConfig(every=2, tasks=1),
            hub=HubConfig(keys=keys, durability=durability),
        )
        configuration.save(config, folder / "config.toml")
        receiver = spawn(__file__, "hub", str(folder))
        try:
            deadline = Deadline(30.0, "bench", "the hub to listen")
            while "address" not in read_json(folder / "hub.json"):
                deadline.check()
                time.sleep(0.01)
            channel = SyncDealerChannel(hub_address(folder), client_keys(keys, "learner-0"))
            learner = LearnerClient(channel, run_id(folder), "learner-0")
            learner.connect(0)
            learner.publish(synthetic.update(0, step=0))
            names = [f"actor-{n}" for n in range(ACTORS)]
            parts = [spawn(__file__, "actor", str(folder), name, str(size), str(count)) for name in names]
            seconds = race(parts)
            learner.close()
        finally:
            stop(receiver)
        return seconds


def plain_seconds(way: str, size: int, count: int, home: Path | str = "") -> float:
    """Return the same time for plain pyzmq; with `home` its receiver keeps everything, synced."""
    receiver = spawn(__file__, f"{way}-receiver", str(ACTORS * count), *([str(home)] if home else []))
    try:
        address = line_of(receiver)
        return race([spawn(__file__, f"{way}-sender", address, str(size), str(count)) for _ in range(ACTORS)])
    finally:
        stop(receiver)


WAYS: Final[dict[str, Callable[[int, int, Path], float]]] = {
    "slipstream": slipstream_seconds,
    "power": partial(slipstream_seconds, durability="power"),
    "curve": partial(slipstream_seconds, curve=True),
    "acked": lambda size, count, _: plain_seconds("acked", size, count),
    "synced": lambda size, count, home: plain_seconds("acked", size, count, home),
    "unacked": lambda size, count, _: plain_seconds("unacked", size, count),
}


def part_hub(folder: str) -> None:
    """Run the real hub."""
    sys.exit(hub.main(configuration.read(Path(folder) / "config.toml"), Path(folder)))


def part_actor(folder: str, name: str, size: str, count: str) -> None:
    """Send `count` trajectories of `size` bytes, each for a lease, and wait for the last acknowledgement."""
    keep_freed_memory()
    collect_garbage_seldom()
    uvloop.run(act(Path(folder), name, int(size), int(count)))


async def act(folder: Path, name: str, size: int, count: int) -> None:
    """Be one actor."""
    config = configuration.read(folder / "config.toml").hub
    spool = Spool(folder / f"{name}.spool", durability=config.durability)
    channel = DealerChannel(hub_address(folder), client_keys(config.keys, name))
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
    left = iter(made)

    async def episodes() -> None:
        for trajectory in left:
            await client.send(trajectory)

    # With "power" as many as end at about the same time share an fdatasync.
    await asyncio.gather(*(episodes() for _ in range(LIVE if spool.must_sync else 1)))
    await client.drain(60.0)
    say("done")
    sys.stdin.readline()


def main() -> int:
    """Run the benchmark, or one part of it in a process of its own."""
    parser = argparse.ArgumentParser(description="Hub and wire against plain pyzmq.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where spools and log lie")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    parts = {"hub": part_hub, "actor": part_actor, "acked-receiver": plain.part_acked_receiver,
             "acked-sender": plain.part_acked_sender, "unacked-receiver": plain.part_unacked_receiver,
             "unacked-sender": plain.part_unacked_sender}  # fmt: skip
    if chosen.part:
        parts[chosen.part[0]](*chosen.part[1:])
        return 0
    figures = run(chosen.rounds, chosen.folder)
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
