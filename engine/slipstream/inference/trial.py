"""Floor 4. A policy tried on many tasks at once in this process: evaluation, warm-up checks, previews."""

from __future__ import annotations

import asyncio

from slipstream.config import RunConfig
from slipstream.inference.embedded import EmbeddedBackend
from slipstream.inference.sampling import rollout_key
from slipstream.interfaces import Runner
from slipstream.model import Policy
from slipstream.types import Lease, Sampling, Split, TaskAttempt, Trajectory


def lease_key(lease: Lease) -> int:
    """Return the key of all random numbers of a leased episode; a lease given again draws the same."""
    attempt = lease.attempt
    return rollout_key(
        lease.split, lease.evaluation, attempt.task, attempt.seed, attempt.group, attempt.attempt
    )


def held_trial(
    policy: Policy,
    runner: Runner,
    *,
    split: Split,
    tasks: int,
    temperature: float,
    top_p: float,
    config: RunConfig,
    attempts: int = 1,
    close: bool = False,
) -> list[Trajectory]:
    """Run tasks 0 .. tasks - 1 of a split and return their trajectories in order, those of one task together.

    `close`: the runner is not used again.

    The model's training mode and gradients are as before when it returns.
    """
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=config.sampling.max_tokens)
    leases = [
        Lease(attempt=TaskAttempt(task=index, seed=config.seed, group=index, attempt=attempt), split=split)
        for index in range(tasks)
        for attempt in range(attempts)
    ]
    training = policy.model.training
    wanted = [parameter.requires_grad for parameter in policy.model.parameters()]
    try:
        return asyncio.run(_all(policy, runner, leases, sampling, config, close=close))
    finally:
        policy.model.train(training)
        for parameter, flag in zip(policy.model.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)


async def _all(
    policy: Policy,
    runner: Runner,
    leases: list[Lease],
    sampling: Sampling,
    config: RunConfig,
    *,
    close: bool,
) -> list[Trajectory]:
    backend = EmbeddedBackend(
        policy.model,
        stop_token=policy.chat.stop_token,
        rows=min(config.actor.concurrency, len(leases)),
        max_tokens=config.environment.max_tokens,
    )
    room = asyncio.Semaphore(backend.rows)

    async def one(lease: Lease) -> Trajectory:
        async with room:
            return await runner.sampled(lease, backend, sampling, rollout_id=lease_key(lease))

    async with asyncio.TaskGroup() as group:
        serving = group.create_task(backend.run())
        episodes = [group.create_task(one(lease)) for lease in leases]
        shown = await asyncio.gather(*episodes)
        serving.cancel()
    if close:
        await runner.close()
    return shown
