"""Floor 5. A policy served to agents outside, apart from any training: each finished rollout is a line.

loop        waits for                       released by
offer       a free row of the policy        an agent that has finished, or run out of its time
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
from pathlib import Path
from typing import Any, Final

import torch
import uvloop

from slipstream.chat import Chat
from slipstream.checkpoint import load_latest
from slipstream.config import RunConfig
from slipstream.errors import CheckpointError
from slipstream.gateway.program import ProgramRunner
from slipstream.inference.embedded import EmbeddedBackend
from slipstream.inference.trial import lease_key
from slipstream.metrics import append_row
from slipstream.model import choose_device, load_policy
from slipstream.programs import OUTSIDE
from slipstream.redaction import Redactor, guard_logs
from slipstream.rewards import reward
from slipstream.runners import configured_runner
from slipstream.types import Lease, Outcome, Sampling, Split, TaskAttempt, Trajectory

FILE: Final = "rollouts.jsonl"


def main(
    config: RunConfig,
    folder: Path,
    checkpoint: Path | None,
    *,
    split: Split,
    port: int,
    greedy: bool = False,
) -> int:
    """Serve the policy of `checkpoint`, or the run's best one, until SIGTERM or SIGINT; returns 0.

    greedy: it says the likeliest, as a judge should, instead of sampling as in training.

    Raises CheckpointError without a policy, AddressError, ConfigurationError.
    """
    torch.set_num_threads(config.actor.threads)
    agent = config.agent.model_copy(update={"program": OUTSIDE, "port": port})
    config = config.model_copy(update={"agent": agent})
    temperature = 0.0 if greedy else config.sampling.temperature
    sampling = Sampling(temperature=temperature, max_tokens=config.sampling.max_tokens)
    return uvloop.run(_serve(config, folder, checkpoint or policy_of(folder), split, sampling))


def policy_of(folder: Path) -> Path:
    """Return the best checkpoint of a run, or its latest, or its warm start; raises CheckpointError."""
    checkpoints = folder / "checkpoints"
    if (checkpoints / "best").is_dir():
        return checkpoints / "best"
    try:
        return load_latest(checkpoints).path
    except CheckpointError as error:
        if (checkpoints / "warmup").is_dir():
            return checkpoints / "warmup"
        raise CheckpointError(
            f"{folder} holds no policy; train one (slipstream train --output {folder}), or give --checkpoint"
        ) from error


async def _serve(config: RunConfig, folder: Path, checkpoint: Path, split: Split, sampling: Sampling) -> int:
    policy = load_policy(checkpoint, config=config.model, device=choose_device(config.device))
    redactor = Redactor.of_process(config.environment.canaries)
    guard_logs(redactor)
    runner = configured_runner(config, policy.chat, redactor, port=config.agent.port)
    assert isinstance(runner, ProgramRunner)
    backend = EmbeddedBackend(
        policy.model,
        stop_token=policy.chat.stop_token,
        rows=config.actor.concurrency,
        max_tokens=config.environment.max_tokens,
    )
    url = await runner.start()
    sys.stdout.write(f"{checkpoint} as policy at {url}; POST {url}/rollouts gives a task and its key\n")
    sys.stdout.flush()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    tasks: list[asyncio.Task[Any]] = [
        asyncio.create_task(backend.run()),
        asyncio.create_task(_offer(config, folder, runner, backend, policy.chat, split, sampling)),
        asyncio.create_task(stopping.wait()),
    ]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await runner.close()
    for ended in done:
        ended.result()
    return 0


async def _offer(
    config: RunConfig,
    folder: Path,
    runner: ProgramRunner,
    backend: EmbeddedBackend,
    chat: Chat,
    split: Split,
    sampling: Sampling,
) -> None:
    """Keep one task waiting for each free row of the backend."""
    room = asyncio.Semaphore(backend.rows)

    async def offered(index: int) -> None:
        attempt = TaskAttempt(task=index, seed=config.seed, group=index, attempt=0)
        lease = Lease(attempt=attempt, split=split)
        try:
            made = await runner.sampled(lease, backend, sampling, rollout_id=lease_key(lease))
        finally:
            room.release()
        if made.outcome is not Outcome.INFRASTRUCTURE_FAILURE:
            append_row(folder / FILE, _row(made, chat, config))

    async with asyncio.TaskGroup() as group:
        for index in itertools.count():
            await room.acquire()
            group.create_task(offered(index))


def _row(made: Trajectory, chat: Chat, config: RunConfig) -> dict[str, object]:
    return {
        "kind": "rollout",
        "task": made.attempt.task,
        "split": str(made.split),
        "outcome": str(made.outcome),
        "reward": reward(made.scores, config.rewards),
        "calls": len(made.turn_rewards),
        "sampled": int(made.loss_mask.sum()),
        "segments": [chat.text(made.token_ids[span]) for span in made.spans],
    }
