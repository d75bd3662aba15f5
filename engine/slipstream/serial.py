"""Floor 6. Serial mode: hub, actor and learner in one thread, with equal results every time.

The same ledger, the same clients and the same messages as over ZeroMQ, handed over in memory; max_slip
is 0, so every trajectory is sampled by the newest weights. Episodes draw the same random numbers as in
the asynchronous system at slip 0.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch

from slipstream.actor import Actor
from slipstream.config import RunConfig
from slipstream.hub import Bookkeeper, open_ledger
from slipstream.learner import Learner
from slipstream.rendezvous import run_id
from slipstream.spool import Spool
from slipstream.transport.client import ActorClient, LearnerClient
from slipstream.transport.memory import MemoryHub


def run(config: RunConfig, folder: Path) -> None:
    """Train a run to its last step in this thread."""
    torch.set_num_threads(config.learner.threads)
    asyncio.run(_run(config.model_copy(update={"max_slip": 0}), folder))


async def _run(config: RunConfig, folder: Path) -> None:
    identity = run_id(folder)
    log, ledger = open_ledger(config, folder, identity)
    hub, books = MemoryHub(ledger), Bookkeeper(ledger, log, folder, config.hub)
    spool = Spool(folder / "spool" / "actor-0", durability=config.hub.durability)
    actor = Actor(config, folder, ActorClient(hub.channel("actor-0"), spool, identity, "actor-0"))
    learner = Learner(config, folder, LearnerClient(hub.sync_channel("learner-0"), identity, "learner-0"))
    serving = asyncio.create_task(actor.serve())
    try:
        learner.start()
        while not learner.done:
            learner.advance(timeout_s=0.0)
            books.turn()
            if serving.done():
                serving.result()
            await asyncio.sleep(0)
        await serving
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        books.finish()
        log.close()
