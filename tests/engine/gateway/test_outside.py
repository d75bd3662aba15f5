"""Agents outside: they come for tasks, are given each one once, and what becomes of it is an outcome."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from slipstream.chat import Chat  # noqa: E402
from slipstream.config import load_config  # noqa: E402
from slipstream.environments import environment_factory  # noqa: E402
from slipstream.gateway.program import ProgramRunner  # noqa: E402
from slipstream.types import (  # noqa: E402
    Completion,
    Int32Array,
    Lease,
    Outcome,
    Sampling,
    Split,
    TaskAttempt,
    Trajectory,
)


class Saying:
    """A policy with one word."""

    def __init__(self, chat: Chat, word: str) -> None:
        self._said = chat.message(word)

    async def generate(self, token_ids: Int32Array, sampling: Sampling, *, rollout_id: int) -> Completion:
        count = len(self._said)
        blank, serial = np.zeros(count, np.float32), np.zeros(count, np.int32)
        return Completion(token_ids=self._said, logprobs=blank, versions=serial, stopped=True)

    def release(self, rollout_id: int) -> None:
        pass

    async def load(self, update: Any) -> Any:
        raise NotImplementedError


class Outside:
    """A gateway for agents outside, and leases that wait for them."""

    def __init__(self, chat: Chat, *, patience_s: float = 30.0, timeout_s: float = 30.0) -> None:
        config = load_config("research", [f"environment.timeout_s={timeout_s}"])
        self.tasks = environment_factory(config.environment, config.rewards).tasks
        self._backend = Saying(chat, "Bern")
        self.runner = ProgramRunner(
            None, tasks=self.tasks, chat=chat, environment=config.environment, rewards=config.rewards,
            patience_s=patience_s,
        )  # fmt: skip

    def lease(self, task: int) -> asyncio.Task[Trajectory]:
        """Let one lease wait for an agent."""
        lease = Lease(attempt=TaskAttempt(task=task, seed=1, group=task, attempt=0), split=Split.TRAIN)
        return asyncio.create_task(
            self.runner.sampled(lease, self._backend, Sampling(max_tokens=8), rollout_id=task)
        )


async def post(client: Any, path: str, body: Any = None, *, status: int, key: str = "") -> Any:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answered = await client.post(path, json=body, headers=headers)
    assert answered.status_code == status, answered.text
    return answered.json()


async def taken(client: Any, **body: str) -> Any:
    """Ask for a task until there is one."""
    async with asyncio.timeout(30):
        while (answered := await client.post("/rollouts", json=body)).status_code == 503:
            assert answered.headers["retry-after"] == "1"
            await asyncio.sleep(0.01)
    assert answered.status_code == 201, answered.text
    return answered.json()


QUESTION = {"model": "policy", "messages": [{"role": "user", "content": "where?"}]}


def test_agents_come_for_tasks_and_each_is_given_once(chat: Chat) -> None:
    outside = Outside(chat)

    async def go() -> list[Trajectory]:
        async with httpx.AsyncClient(base_url=await outside.runner.start()) as client:
            refused = await post(client, "/rollouts", status=503)
            assert "no task waits for an agent now" in refused["error"]["message"]
            leases = [outside.lease(5), outside.lease(6)]
            first, second = await taken(client), await taken(client, key="mine")
            await post(client, "/rollouts", status=503)
            assert [first["task"]["index"], second["task"]["index"]] == [5, 6]
            assert first["task"]["question"] == outside.tasks.task(Split.TRAIN, 5).question
            assert second["api_key"] == "mine"
            for key in (first["api_key"], "mine"):
                await post(client, "/chat/completions", QUESTION, status=200, key=key)
            await post(client, "/rollouts/mine/reward", {"value": 0.5}, status=200)
            await post(client, "/rollouts/mine/reward", {"value": 0.25}, status=200)
            await post(client, "/rollouts/mine/finish", status=200)
            await post(client, f"/rollouts/{first['id']}/finish", status=200)
            made = await asyncio.gather(*leases)
            late = await post(client, "/chat/completions", QUESTION, status=409, key="mine")
            assert late["error"]["message"] == "rollout mine: it is finished; open another"
            await post(client, "/rollouts/mine/reward", {"value": 1}, status=409)
            await post(client, "/messages/count_tokens", QUESTION, status=401, key="nobody")
            await outside.runner.close()
            return list(made)

    without, rewarded = asyncio.run(go())
    assert [score.value for score in rewarded.scores] == [0.75]
    assert (rewarded.attempt.task, rewarded.outcome) == (6, Outcome.COMPLETED)
    assert chat.text(rewarded.token_ids[rewarded.loss_mask == 1]) == "Bern"
    assert without.scores[0].value is None and "posted none" in without.scores[0].invalid


def test_a_key_in_use_takes_no_task(chat: Chat) -> None:
    outside = Outside(chat)

    async def go() -> None:
        async with httpx.AsyncClient(base_url=await outside.runner.start()) as client:
            leases = [outside.lease(1), outside.lease(2)]
            await taken(client, key="mine")
            refused = await post(client, "/rollouts", {"key": "mine"}, status=409)
            assert "rollout mine: its key is taken" in refused["error"]["message"]
            assert (await taken(client))["task"]["index"] == 2
            for lease in leases:
                lease.cancel()
            await asyncio.gather(*leases, return_exceptions=True)
            await outside.runner.close()

    asyncio.run(go())


@pytest.mark.parametrize(
    ("takes", "asks", "outcome", "note"),
    [
        (False, False, Outcome.INFRASTRUCTURE_FAILURE, "no agent asked for the task within 0.2 s"),
        (True, False, Outcome.INFRASTRUCTURE_FAILURE, "took a task and asked nothing in time"),
        (True, True, Outcome.TIMED_OUT, "no end within environment.timeout_s = 0.5 s"),
    ],
)
def test_an_agent_that_stays_away_is_no_fault_of_the_policys(
    chat: Chat, takes: bool, asks: bool, outcome: Outcome, note: str
) -> None:
    outside = Outside(chat, patience_s=30.0 if takes else 0.2, timeout_s=0.5)

    async def go() -> Trajectory:
        async with httpx.AsyncClient(base_url=await outside.runner.start()) as client:
            lease = outside.lease(3)
            if takes:
                key = (await taken(client))["api_key"]
            if asks:
                await post(client, "/chat/completions", QUESTION, status=200, key=key)
            made = await lease
            await outside.runner.close()
            return made

    made = asyncio.run(go())
    assert made.outcome is outcome and note in made.note
    assert [score.value for score in made.scores] == ([0.0] if asks else [])
