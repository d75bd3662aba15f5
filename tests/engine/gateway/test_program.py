"""Agent programs: what becomes of an episode that another program plays, and what of it is trained."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

EXAMPLES = Path(__file__).parents[3] / "examples"
sys.path.insert(0, str(EXAMPLES))

import openai_agent  # noqa: E402

from slipstream import launch, wire  # noqa: E402
from slipstream.chat import Chat  # noqa: E402
from slipstream.config import RunConfig, load_config  # noqa: E402
from slipstream.demonstrations import demonstrations  # noqa: E402
from slipstream.environments import environment_factory  # noqa: E402
from slipstream.episodes import EpisodeRunner  # noqa: E402
from slipstream.errors import ConfigurationError  # noqa: E402
from slipstream.gateway.players import ProgramPlayer  # noqa: E402
from slipstream.gateway.program import ProgramRunner  # noqa: E402
from slipstream.programs import check_program, load_program  # noqa: E402
from slipstream.redaction import Redactor  # noqa: E402
from slipstream.runners import configured_runner  # noqa: E402
from slipstream.types import (  # noqa: E402
    Completion,
    Int32Array,
    Lease,
    Outcome,
    Sampling,
    Split,
    Task,
    TaskAttempt,
    ToolStatus,
    Trajectory,
)

CONFIG = load_config("research", ["environment.tool_failure_rate=0", "environment.max_turns=4"])
LEASE = Lease(attempt=TaskAttempt(task=3, seed=1, group=3, attempt=0), split=Split.TRAIN)
SAMPLING = Sampling(max_tokens=48)


class Sampled:
    """A backend that gives out sampled messages, one after another."""

    def __init__(self, messages: Iterable[Int32Array]) -> None:
        self._messages, self.released = list(messages), list[int]()
        self.prompts: list[list[int]] = []

    async def generate(self, token_ids: Int32Array, sampling: Sampling, *, rollout_id: int) -> Completion:
        self.prompts.append(token_ids.tolist())
        said = self._messages.pop(0)
        versions = np.full(len(said), 5, np.int32)
        logprobs = np.linspace(-1.0, -0.1, len(said), dtype=np.float32)
        return Completion(token_ids=said, logprobs=logprobs, versions=versions, stopped=True)

    def release(self, rollout_id: int) -> None:
        self.released.append(rollout_id)

    async def load(self, update: Any) -> Any:
        raise NotImplementedError


def played(
    chat: Chat,
    program: Callable[..., Any],
    *words: str,
    config: RunConfig = CONFIG,
    malformed_calls: str = "keep",
) -> tuple[Trajectory, Sampled]:
    """Return what becomes of one episode of a program whose policy says these words."""
    backend = Sampled([chat.message(word) for word in words])
    runner = ProgramRunner(
        program,
        tasks=environment_factory(config.environment, config.rewards).tasks,
        chat=chat,
        environment=config.environment,
        rewards=config.rewards,
        malformed_calls=malformed_calls,
    )
    return asyncio.run(one_episode(runner, backend)), backend


async def one_episode(runner: ProgramRunner, backend: Sampled, lease: Lease = LEASE) -> Trajectory:
    try:
        return await runner.sampled(lease, backend, SAMPLING, rollout_id=9)
    finally:
        await runner.close()


async def ask(base_url: str, api_key: str, *texts: str) -> str:
    """Ask once, as a user who says these things."""
    messages = [{"role": "user", "content": text} for text in texts]
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
        answered = await client.chat.completions.create(model="policy", messages=messages)
    return str(answered.choices[0].message.content)


def test_an_agent_of_openais_client_is_recorded_as_the_environments_own_loop_is(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token for token: prompt, tool results and what was sampled."""
    factory = environment_factory(CONFIG.environment, CONFIG.rewards)
    monkeypatch.setattr(openai_agent, "WORLD", factory)
    native = EpisodeRunner(factory=factory, chat=chat, environment=CONFIG.environment, rewards=CONFIG.rewards)
    (shown,) = asyncio.run(demonstrations(native, CONFIG, [LEASE.attempt.task], chat))
    spans = [np.flatnonzero(shown.turns == turn) for turn in range(len(shown.turn_rewards))]
    backend = Sampled([shown.token_ids[span] for span in spans])
    runner = ProgramRunner(
        openai_agent.run, tasks=factory.tasks, chat=chat, environment=CONFIG.environment,
        rewards=CONFIG.rewards,
    )  # fmt: skip
    lease = Lease(attempt=shown.attempt, split=shown.split)
    made = asyncio.run(one_episode(runner, backend, lease))
    assert (made.outcome, made.note) == (Outcome.COMPLETED, "")
    for name in ("token_ids", "loss_mask", "turns"):
        np.testing.assert_array_equal(getattr(made, name), getattr(shown, name))
    assert made.segments == () and made.success == shown.success
    assert [(call.turn, call.name, call.arguments) for call in made.tool_calls] == [
        (call.turn, call.name, call.arguments) for call in shown.tool_calls
    ]
    assert made.turn_rewards.sum() == pytest.approx(shown.turn_rewards.sum())
    assert backend.released == [9]
    # Asked, answered, asked again: what lies between two calls is the agent's time.
    marks = made.timings.marks_ms
    assert len(marks) == 3 * len(spans) and list(marks) == sorted(marks)
    assert marks[2:-1:3] == marks[3::3]


SEARCH = '<tool_call>{"name": "search", "arguments": {"query": "Oslo"}}</tool_call>'


@pytest.mark.parametrize(
    "words",
    [("", SEARCH, "", ""), ("<think>hm</think>", f"so <think>hm</think>{SEARCH}", f"{SEARCH}?", "Oslo")],
    ids=["nothing", "thoughts"],
)
def test_odd_answers_that_pydantic_ai_tells_again_are_one_conversation(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """It leaves out an answer that says nothing, and writes blanks around thoughts."""
    pytest.importorskip("pydantic_ai", reason="needs pip install 'pydantic-ai-slim[openai]'")
    import pydantic_ai_agent

    monkeypatch.setattr(pydantic_ai_agent, "WORLD", environment_factory(CONFIG.environment, CONFIG.rewards))

    async def program(task: Task, *, base_url: str, api_key: str) -> float:
        async with pydantic_ai_agent.client(base_url):
            return await pydantic_ai_agent.run(task, base_url=base_url, api_key=api_key)

    made, backend = played(chat, program, *words)
    assert (made.outcome, made.note) == (Outcome.TRUNCATED, "too many calls")
    assert made.segments == () and len(backend.prompts) == len(words)
    assert chat.decode(made.token_ids[made.loss_mask == 1]) == "".join(f"{one}<|end|>" for one in words)


def test_a_history_that_is_summed_up_begins_a_segment(chat: Chat) -> None:
    async def program(task: Task, *, base_url: str, api_key: str) -> float:
        await ask(base_url, api_key, task.question)
        await ask(base_url, api_key, "so far: nothing", "go on")
        return 0.5

    made, backend = played(chat, program, "Athens", "Bern")
    first, second = (len(prompt) for prompt in backend.prompts)
    said = [chat.message("Athens"), chat.message("Bern")]
    expected = [*backend.prompts[0], *said[0], *backend.prompts[1], *said[1]]
    assert made.token_ids.tolist() == expected
    assert made.segments == (first + len(said[0]),)
    assert made.turns[made.loss_mask == 1].tolist() == [0] * len(said[0]) + [1] * len(said[1])
    assert made.loss_mask[:first].sum() == 0
    assert made.loss_mask[made.segments[0] : made.segments[0] + second].sum() == 0
    assert made.turn_rewards.tolist() == [0.0, 0.5]
    again = wire.decode_trajectory(wire.encode_trajectory(made))
    assert again.segments == made.segments


async def _posts(task: Task, *, base_url: str, api_key: str) -> None:
    await ask(base_url, api_key, "hello")
    async with httpx.AsyncClient() as client:
        for value in (0.25, 0.5):
            done = await client.post(f"{base_url}/rollouts/{api_key}/reward", json={"value": value})
            assert done.status_code == 200


async def _raises(task: Task, *, base_url: str, api_key: str) -> float:
    await ask(base_url, api_key, "hello")
    raise KeyError("a bug of the agent")


async def _gives_up(task: Task, *, base_url: str, api_key: str) -> float:
    await ask(base_url, api_key, "hello")
    raise asyncio.CancelledError


async def _never_ends(task: Task, *, base_url: str, api_key: str) -> float:
    await ask(base_url, api_key, "hello")
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def _asks_too_often(task: Task, *, base_url: str, api_key: str) -> float:
    for _ in range(9):
        await ask(base_url, api_key, "hello")
    raise AssertionError("unreachable")


async def _returns_nothing(task: Task, *, base_url: str, api_key: str) -> None:
    await ask(base_url, api_key, "hello")


def _plain(task: Task, *, base_url: str, api_key: str) -> float:
    """Without asyncio: it gets a thread of its own."""
    with openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
        client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "hello"}])
    return 2.0


@pytest.mark.parametrize(
    ("program", "outcome", "value", "note", "calls"),
    [
        (_plain, Outcome.COMPLETED, 2.0, "", 1),
        (_posts, Outcome.COMPLETED, 0.75, "", 1),
        (_returns_nothing, Outcome.COMPLETED, None, "", 1),
        (_asks_too_often, Outcome.TRUNCATED, 0.0, "too many calls", 4),
        (_never_ends, Outcome.TIMED_OUT, 0.0, "no end within environment.timeout_s = 2 s", 1),
        (_gives_up, Outcome.INFRASTRUCTURE_FAILURE, None, "agent.program: it cancelled itself", 1),
        (_raises, Outcome.INFRASTRUCTURE_FAILURE, None, "agent.program: KeyError: 'a bug of the agent'", 1),
    ],
)
def test_how_a_program_ends_is_the_outcome(
    chat: Chat, program: Callable[..., Awaitable[Any]], outcome: Outcome, value: float | None, note: str,
    calls: int,
) -> None:  # fmt: skip
    config = load_config("research", ["environment.timeout_s=2", "environment.max_turns=4"])
    made, backend = played(chat, program, *["Bern"] * 9, config=config)
    assert (made.outcome, made.note) == (outcome, note)
    scores = [(score.name, score.value) for score in made.scores]
    assert scores == ([] if outcome is Outcome.INFRASTRUCTURE_FAILURE else [("agent", value)])
    assert len(backend.prompts) == calls
    wire.encode_trajectory(made)


BROKEN = '<tool_call>{"name": "search", </tool_call>'


async def _asks_twice(task: Task, *, base_url: str, api_key: str) -> float:
    await ask(base_url, api_key, "hello")
    await ask(base_url, api_key, "so far: nothing")
    return 1.0


@pytest.mark.parametrize(
    ("malformed_calls", "rewards", "trained"),
    [
        ("keep", [0.0, 1.0], f"Is é {BROKEN} it?<|end|>Oslo<|end|>"),
        ("penalise", [-0.2, 1.0], f"Is é {BROKEN} it?<|end|>Oslo<|end|>"),
        ("mask", [0.0, 1.0], "Is é  it?<|end|>Oslo<|end|>"),
    ],
)
def test_a_malformed_call_costs_what_is_configured(
    chat: Chat, malformed_calls: str, rewards: list[float], trained: str
) -> None:
    """The agent reads it as text; it is noted; then it is trained, punished or left out."""
    said = f"Is é {BROKEN} it?"
    made, backend = played(chat, _asks_twice, said, "Oslo", malformed_calls=malformed_calls)
    assert made.turn_rewards.tolist() == pytest.approx(rewards)
    assert chat.decode(made.token_ids[made.loss_mask == 1]) == trained
    assert set(made.versions[made.loss_mask == 1].tolist()) == {5}
    for array, blank in ((made.versions, -1), (made.turns, -1), (made.behavior_logprobs, 0)):
        assert set(array[made.loss_mask == 0].tolist()) == {blank}
    assert [(call.turn, call.status) for call in made.tool_calls] == [(0, ToolStatus.INVALID)]
    first = [*backend.prompts[0], *chat.message(said)]
    assert made.token_ids[: len(first)].tolist() == first, "what was sampled stays in the context"
    wire.encode_trajectory(made)


def test_what_malformed_calls_cost_is_configured(chat: Chat) -> None:
    config = load_config("research", [f"agent.program={__file__}:_asks_twice", "agent.malformed_calls=mask"])
    runner = configured_runner(config, chat, Redactor.of_process())
    made = asyncio.run(one_episode(runner, Sampled([chat.message(BROKEN), chat.message("Oslo")])))  # type: ignore[arg-type]
    assert chat.decode(made.token_ids[made.loss_mask == 1]) == "<|end|>Oslo<|end|>"


def test_secrets_are_kept_from_the_policy(chat: Chat) -> None:
    async def program(task: Task, *, base_url: str, api_key: str) -> float:
        await ask(base_url, api_key, "the word is open-sesame-42")
        return 1.0

    config = load_config(
        "research", ['environment.canaries=["open-sesame-42"]', f"agent.program={__file__}:_raises"]
    )
    runner = configured_runner(config, chat, Redactor.of_process(config.environment.canaries))
    assert isinstance(runner, ProgramRunner)
    assert isinstance(runner._player, ProgramPlayer)
    runner._player._program = program
    made = asyncio.run(one_episode(runner, Sampled([chat.message("Bern")])))
    assert "sesame" not in chat.text(made.token_ids)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("agent", "expected module:attribute or path.py:attribute, got 'agent'"),
        ("no_such_module:run", "cannot load no_such_module"),
        ("/no/such/file.py:run", "cannot load /no/such/file.py"),
        ("json:no_such_function", "expected no_such_function in json, found no such name"),
    ],
)
def test_a_program_that_is_none_is_one_sentence(name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_program(name)


def test_a_program_that_cannot_be_found_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    for name in (f"{tmp_path}/agent.py:run", "no_such_module:run"):
        config = load_config("research", [f"agent.program={name}"])
        with pytest.raises(ConfigurationError, match=r"agent.program: cannot find .*; give path.py:function"):
            launch.train(config, tmp_path / "run", resume=False, serial=False, screen=mock.MagicMock())
    assert not (tmp_path / "run").exists()
    check_program("json:dumps")
