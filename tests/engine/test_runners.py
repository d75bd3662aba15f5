"""Which environment a leased episode is run in."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest

from slipstream.chat import Chat
from slipstream.config import RunConfig, load_config
from slipstream.episodes import EpisodeRunner
from slipstream.errors import ConfigurationError
from slipstream.redaction import Redactor
from slipstream.runners import StagedRunner, configured_runner
from slipstream.tools.hermes import format_call
from slipstream.types import Completion, Int32Array, Lease, Outcome, Sampling, Split, TaskAttempt

LEASE = Lease(attempt=TaskAttempt(task=5, seed=1, group=5, attempt=2), split=Split.TRAIN)
STAGES = (
    "curriculum.stages=[{tools=['open', 'answer'], environment={max_turns=2, tool_failure_rate=1.0}},"
    " {lenient=1.0, environment={tool_failure_rate=0.0, options={documents_per_fact=1}}}]"
)


def config_of(*overrides: str) -> RunConfig:
    return load_config("research", ["curriculum.enabled=true", *overrides])


class Parrot:
    """A backend that says given texts, the last one for ever, and keeps what it was shown."""

    def __init__(self, chat: Chat, *texts: str) -> None:
        self._chat, self._texts, self.shown = chat, list(texts), ""

    async def generate(self, token_ids: Int32Array, sampling: Sampling, *, rollout_id: int) -> Completion:
        self.shown = self._chat.text(token_ids)
        text = self._texts.pop(0) if len(self._texts) > 1 else self._texts[0]
        said = self._chat.message(text)
        blank = np.zeros(len(said), np.float32)
        return Completion(
            token_ids=said, logprobs=blank, versions=np.zeros(len(said), np.int32), stopped=True
        )

    def release(self, rollout_id: int) -> None:
        pass

    async def load(self, update: object) -> object:
        raise NotImplementedError


def test_an_episode_runs_in_the_environment_of_its_stage(chat: Chat) -> None:
    runner = configured_runner(config_of(STAGES), chat, Redactor())
    assert isinstance(runner, StagedRunner)

    def run(stage: int, *texts: str) -> tuple[str, Outcome, int, list[str]]:
        parrot = Parrot(chat, *texts)
        lease = dataclasses.replace(LEASE, stage=stage)
        made = asyncio.run(runner.sampled(lease, parrot, Sampling(temperature=1.1), rollout_id=1))  # type: ignore[arg-type]
        assert (made.stage, made.sampling.temperature) == (stage, 1.1)
        return (
            parrot.shown,
            made.outcome,
            len(made.turn_rewards),
            [str(call.status) for call in made.tool_calls],
        )

    opened = format_call("open", {"document": "10"})
    shown, outcome, turns, statuses = run(0, opened)
    # Two turns, every call fails, and there is no search.
    assert (outcome, turns, statuses) == (Outcome.TRUNCATED, 2, ["error", "error"])
    assert "open(document)" in shown
    assert "search(query)" not in shown
    shown, outcome, turns, _ = run(-1, opened)
    assert (outcome, turns) == (Outcome.TRUNCATED, 10)
    assert "search(query)" in shown
    _, outcome, turns, statuses = run(1, opened)
    assert (outcome, turns, set(statuses)) == (Outcome.TRUNCATED, 10, {"error", "ok"} & set(statuses))
    # A tool that a stage does not have is no valid call.
    _, outcome, _, statuses = run(0, format_call("search", {"query": "home"}))
    assert statuses == []


def test_progress_is_a_success_in_a_lenient_stage_alone(chat: Chat) -> None:
    config = config_of(STAGES)
    runner = configured_runner(config, chat, Redactor())
    assert isinstance(runner, StagedRunner)
    (lenient,) = [r for r in runner._stages if isinstance(r, EpisodeRunner) and r.lenient]
    person = lenient.factory.tasks.task(Split.TRAIN, 5)
    (fact,) = person.data["facts"]
    texts = (format_call("open", {"document": fact}), format_call("answer", {"text": "unknown"}))

    def success(stage: int) -> bool:
        lease = dataclasses.replace(LEASE, stage=stage)
        return asyncio.run(runner.sampled(lease, Parrot(chat, *texts), Sampling(), rollout_id=1)).success  # type: ignore[arg-type]

    assert success(1)
    assert not success(-1)


def test_without_stages_there_is_one_runner(chat: Chat) -> None:
    for config in (config_of(), load_config("research", [STAGES])):
        assert isinstance(configured_runner(config, chat, Redactor()), EpisodeRunner)


def test_a_stage_with_wrong_options_or_tools_is_refused(chat: Chat) -> None:
    for stages, message in (
        ("[{environment={options={hop=1}}}]", "has no option hop; did you mean hops"),
        ("[{tools=['fetch']}]", "has no tool fetch; there is search, open, answer"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            configured_runner(config_of(f"curriculum.stages={stages}"), chat, Redactor())
