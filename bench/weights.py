"""Weights from a learner to a worker of a server: by what changed in them, beside whole by gloo.

    slipstream bench weights [-- --rounds N --layers N --lr X --json FILE]

The tensors have SmolLM2-135M's shapes (30 layers, 272 tensors, 269 MB of bfloat16). In each round AdamW makes
one step of `--lr` in float32 master weights, which are rounded and published; then each way, in turn, brings
them into a process of its own. Gradients are random, so that all masters move by about `lr`; the masters lie
anywhere between two bfloat16 values, as they do in the middle of training.

    offer     until the sender can begin: reading and checking, for changes also comparing; the server goes on
    deliver   until the worker has all tensors and the sum of all bytes; the server is paused
    share     of the values that changed

Both ends run on this machine, whose loopback is faster than most networks: below `break_even_gbit_s`, the
changes arrive sooner than the whole. `load_per_core` (5 minutes) is about 1 on a machine that does nothing
else. Figures are medians over the rounds, ratios those of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from _parts import line_of, say, spawn, stop

from slipstream.inference.vllm.transports import Held, WeightTransport, receiver_of, transport_of
from slipstream.inference.vllm.transports.broadcast import DTYPES
from slipstream.types import Version, WeightUpdate
from slipstream.weights.filesystem import FilesystemPublisher
from slipstream_kernels import checksum64_named

WAYS: Final = ("gloo", "delta")
HIDDEN, INTERMEDIATE, KEYS, VOCABULARY = 576, 1536, 192, 49152
WANTED: Final = {"gloo_seconds": 3.0}
Row = dict[str, float]


class Learner:
    """Master weights, and what is published of them."""

    def __init__(self, folder: Path, layers: int, lr: float) -> None:
        """Draw the weights."""
        torch.manual_seed(0)
        self.masters = {name: 0.05 * torch.randn(shape) for name, shape in shapes(layers).items()}
        self._optimizer = torch.optim.AdamW(self.masters.values(), lr=lr, foreach=False)
        self._publisher = FilesystemPublisher(folder, keep=2)
        self._serial = -1
        self._weights: dict[str, torch.Tensor] = {}
        self.share = 0.0

    def publish(self) -> WeightUpdate:
        """Make one step and publish the weights."""
        for master in self.masters.values():
            master.grad = torch.randn_like(master)
        self._optimizer.step()
        self._optimizer.zero_grad()
        weights = {name: master.bfloat16() for name, master in self.masters.items()}
        changed = sum(int((old != weights[name]).sum()) for name, old in self._weights.items())
        self.share = changed / sum(weight.numel() for weight in weights.values())
        self._weights = weights
        self._serial += 1
        folder = self._publisher.publish(weights, serial=self._serial)
        version = Version(
            serial=self._serial,
            incarnation=0,
            step=self._serial,
            fork_step=0,
            checksum64=checksum64_named(weights),
        )
        return WeightUpdate(version=version, folder=folder, canary_tokens=(), canary_logprobs=())


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a Llama of SmolLM2's sizes with a tied head."""
    found: dict[str, tuple[int, ...]] = {"embed": (VOCABULARY, HIDDEN), "norm": (HIDDEN,)}
    for layer in range(layers):
        found |= {
            f"{layer}.q": (HIDDEN, HIDDEN),
            f"{layer}.k": (KEYS, HIDDEN),
            f"{layer}.v": (KEYS, HIDDEN),
            f"{layer}.o": (HIDDEN, HIDDEN),
            f"{layer}.gate": (INTERMEDIATE, HIDDEN),
            f"{layer}.up": (INTERMEDIATE, HIDDEN),
            f"{layer}.down": (HIDDEN, INTERMEDIATE),
            f"{layer}.norm1": (HIDDEN,),
            f"{layer}.norm2": (HIDDEN,),
        }
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both ways in turn, print the figures and write them where asked."""
    parser = argparse.ArgumentParser(prog="weights.py", description="Weights by what changed, and whole.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--part", choices=WAYS, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.part:
        return work(chosen.part)
    rows: dict[str, list[Row]] = {way: [] for way in WAYS}
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        learner = Learner(Path(folder), chosen.layers, chosen.lr)
        workers = {way: spawn(__file__, way) for way in WAYS}
        senders = {way: transport_of(way) for way in WAYS}
        held: dict[str, Held | None] = dict.fromkeys(WAYS)
        try:
            for number in range(chosen.rounds + 1):
                update = learner.publish()
                for way in WAYS if number % 2 else reversed(WAYS):
                    row = delivered(senders[way], update, held[way], workers[way])
                    held[way] = Held(serial=update.version.serial, checksum64=update.version.checksum64)
                    if number:
                        rows[way].append(row)
                if number:
                    shares.append(learner.share)
        finally:
            for worker in workers.values():
                stop(worker)
    figures = summary(rows, shares) | {"lr": chosen.lr, "layers": chosen.layers, "wanted": WANTED}
    show(figures)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def delivered(
    sender: WeightTransport, update: WeightUpdate, held: Held | None, worker: subprocess.Popen[str]
) -> Row:
    """Bring one update into a worker and return what it took."""
    began = time.perf_counter()
    offer = sender.offer(update, workers=1, held=held)
    offered = time.perf_counter()
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(offer.info) + "\n")
    worker.stdin.flush()
    with ThreadPoolExecutor(1) as pool:
        assert offer.send is not None
        sent = pool.submit(offer.send)
        answer = line_of(worker)
        sent.result()
    ended = time.perf_counter()
    assert answer == f"{update.version.checksum64:016x}", answer
    layout = offer.info["layout"]
    sizes = [getattr(torch, dtype).itemsize * prod(shape) for _, dtype, shape in layout if dtype in DTYPES]
    return {
        "bytes": float(sum(sizes)),
        "offer_s": offered - began,
        "deliver_s": ended - offered,
        "seconds": ended - began,
    }


def work(way: str) -> int:
    """Take what is offered, line after line, and answer with the sum of all bytes."""
    receiver = receiver_of(way)
    for line in sys.stdin:
        _, checksum = receiver.take(json.loads(line), worker=0)
        say(f"{checksum:016x}")
    return 0


def summary(rows: dict[str, list[Row]], shares: list[float]) -> dict[str, Any]:
    """Return medians, and ratios of the whole to the changes within a round."""
    figures: dict[str, Any] = {
        way: {key: statistics.median(row[key] for row in rows[way]) for key in rows[way][0]} for way in WAYS
    }
    pairs = list(zip(rows["gloo"], rows["delta"], strict=True))
    figures["ratios"] = {
        key: statistics.median(whole[key] / changes[key] for whole, changes in pairs)
        for key in rows["gloo"][0]
    }
    saved = statistics.median(whole["bytes"] - changes["bytes"] for whole, changes in pairs)
    lost = statistics.median(changes["deliver_s"] - whole["deliver_s"] for whole, changes in pairs)
    figures["break_even_gbit_s"] = 8e-9 * saved / lost if lost > 0 else None
    figures["share"] = statistics.median(shares)
    figures["load_per_core"] = os.getloadavg()[1] / (os.cpu_count() or 1)
    return figures


def show(figures: dict[str, Any]) -> None:
    """Print the figures."""
    for way in WAYS:
        row = figures[way]
        sys.stdout.write(
            f"{way:<6} {row['bytes'] / 1e6:8.1f} MB  offer {row['offer_s']:6.2f} s  "
            f"deliver {row['deliver_s']:6.2f} s  in all {row['seconds']:6.2f} s\n"
        )
    ratios = figures["ratios"]
    sys.stdout.write(
        f"{100 * figures['share']:.2f} % of the values changed; whole over changes: "
        f"bytes x{ratios['bytes']:.1f}, deliver x{ratios['deliver_s']:.2f}, in all x{ratios['seconds']:.2f}\n"
    )
    if figures["break_even_gbit_s"] is None:
        sys.stdout.write("the changes arrive sooner on this machine's loopback, too\n")
    else:
        sys.stdout.write(f"the changes arrive sooner below {figures['break_even_gbit_s']:.2f} Gbit/s\n")


if __name__ == "__main__":
    sys.exit(main())
