"""environment(...): whole episodes, resuming, the sandbox, and what is refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from authored_worlds import ATTEMPT, QUIET, answered, capitals, opened, right, say, scores, world

from slipstream.authoring.environment import environment
from slipstream.authoring.episode import Episode
from slipstream.authoring.rewards import monitor
from slipstream.authoring.tools import tool, tool_call
from slipstream.config import EnvironmentConfig, RewardConfig, load_config
from slipstream.demonstrations import play
from slipstream.environments import environment_factory
from slipstream.episodes import EpisodeRunner
from slipstream.errors import ConfigurationError, MonitorError
from slipstream.interfaces import Conversing, Resumable
from slipstream.types import Outcome, Split

if TYPE_CHECKING:
    from slipstream.chat import Chat

OWN = """
import os
from slipstream import Episode, environment, monitor, reward, tool, tool_call

def tasks(split, index):
    return {"question": f"Number {index} of {split}?", "answer": f"{split} {index}"}

@tool
def look(episode: Episode) -> str:
    episode.state["looks"] = episode.state.get("looks", 0) + 1
    return f"{sorted(episode.task.data)} {episode.state['looks']} {os.getpid()}"

@tool
def crash(hard: bool) -> str:
    if hard:
        os._exit(1)
    raise KeyError("x")

@reward(1.0)
def right(episode: Episode) -> bool:
    return episode.answer == episode.task.data["answer"] and episode.state["looks"] == 2

def oracle(task):
    "knows"
    yield look.call()
    yield look.call()
    yield tool_call("answer", text=task.data["answer"])

mine = environment(tasks=tasks, tools=[look, crash], rewards=[right], oracle=oracle)

@monitor("halt")
def never(episode: Episode) -> str:
    return "the answer was seen"

halting = environment(tasks=tasks, tools=[look, crash], rewards=[right, never], oracle=oracle)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own_task.py"
    path.write_text(OWN)
    return path


def test_tools_are_those_of_the_author_and_answer() -> None:
    @tool
    def answer(city: str, episode: Episode) -> None:
        """Answer with a city."""
        episode.end(city)

    @tool
    def idle() -> None: ...

    assert [spec.name for spec in opened(world([idle])).tools] == ["idle", "answer"]
    assert [spec.name for spec in opened(world([idle], answer="none")).tools] == ["idle"]
    own = opened(world([answer]))
    assert [list(spec.parameters["properties"]) for spec in own.tools] == [["city"]]
    moved = say(own, answer.call(city="City 0"))
    assert moved.done and scores(own)["right"].value == 1.0


def test_an_answer_in_text_ends_the_episode() -> None:
    made = opened(world(answer="text"))
    assert isinstance(made, Conversing) and made.converses and not made.tools
    from slipstream.interfaces import AssistantMessage

    assert asyncio.run(made.step(AssistantMessage(text=" City 0\n"))).done
    assert scores(made)["right"].value == 1.0


def test_an_episode_tells_its_author_all_that_happened() -> None:
    seen: list[Episode] = []

    @tool
    def roll(episode: Episode) -> int:
        return episode.random.randrange(1000)

    def judge(episode: Episode) -> bool:
        seen.append(episode)
        return True

    from slipstream.authoring.rewards import metric

    made = opened(world([roll], [right, metric(judge)], system="Be brief."))
    first = say(made, roll.call()).observation
    say(made, "nonsense")
    say(made, tool_call("answer", text="City 0"))
    again = opened(world([roll], system="Be brief."))
    assert say(again, roll.call()).observation == first
    scores(made)
    (episode,) = seen
    assert [message["role"] for message in episode.messages] == [
        "system", "user", "assistant", "tool", "assistant", "tool", "assistant"
    ]  # fmt: skip
    assert episode.messages[3]["content"] == first
    assert episode.messages[5]["content"] == "error: no tool call"
    assert [(call.name, call.result) for call in episode.calls] == [("roll", first), ("answer", "")]
    assert (episode.turns, episode.invalid, episode.answer, episode.ended) == (3, 1, "City 0", True)


def test_an_episode_goes_on_in_another_object() -> None:
    @tool
    def count(episode: Episode) -> int:
        episode.state["n"] = episode.state.get("n", 0) + 1
        return int(episode.state["n"])

    authored = world([count])
    made = opened(authored)
    say(made, count.call())
    assert isinstance(made, Resumable) and set(made.secrets) == {"answer"}
    state = made.state()
    say(made, count.call())
    kept = json.loads(json.dumps(state))
    factory = authored(QUIET, RewardConfig())
    other = factory.make()
    assert isinstance(other, Resumable)
    asyncio.run(other.restore(factory.tasks.task(Split.HELDOUT, 0), ATTEMPT, kept))
    assert say(other, count.call()).observation == "2"
    assert other.state() == made.state()
    say(other, tool_call("answer", text="City 0"))
    assert scores(other)["step"].value == 3.0
    assert not isinstance(opened(world([count], resumable=False)), Resumable)


def runner(config: EnvironmentConfig, chat: Chat) -> EpisodeRunner:
    factory = environment_factory(config, RewardConfig())
    return EpisodeRunner(factory=factory, chat=chat, environment=config, rewards=RewardConfig())


def test_the_oracle_plays_by_name(own: Path, chat: Chat) -> None:
    ran = runner(EnvironmentConfig(name=f"{own}:mine", max_tokens=2048), chat)
    script = ran.factory.scripts["oracle"]
    assert script.about == "knows"
    shown = asyncio.run(play(ran, load_config("research"), Split.HELDOUT, 3, script))
    assert (shown.outcome, shown.success) == (Outcome.COMPLETED, True)
    text = "".join(ran.factory.corpus())
    assert "Number 3 of train?" in text and '{"name": "look"' in text and "train 3" in text


def test_a_monitor_that_halts_ends_the_run_with_a_sentence(own: Path, chat: Chat) -> None:
    ran = runner(EnvironmentConfig(name=f"{own}:halting", max_tokens=2048), chat)
    with pytest.raises(MonitorError) as caught:
        asyncio.run(play(ran, load_config("research"), Split.HELDOUT, 3, ran.factory.scripts["oracle"]))
    assert str(caught.value) == (
        "monitor never ends the run at task 3 of heldout, attempt 0: the answer was seen; mend the "
        "environment, or give the monitor another action, and go on with --resume"
    )
    assert caught.value.exit_code == 2


def test_it_works_in_a_sandbox(own: Path) -> None:
    """Tools run in a worker, which never sees the answer; one that takes its worker down costs a step."""
    import os

    config = EnvironmentConfig(name=f"{own}:mine", sandbox="process")
    factory = environment_factory(config, RewardConfig())
    try:

        async def episode() -> list[Any]:
            made = factory.make()
            task = factory.tasks.task(Split.HELDOUT, 0)
            await made.reset(task, ATTEMPT)
            from slipstream.tools.hermes import parse_call

            calls = [("look", {}), ("crash", {"hard": True}), ("crash", {"hard": False}), ("look", {})]
            moved = [await made.step(parse_call(tool_call(n, **a), made.tools)) for n, a in calls]
            await made.step(parse_call(tool_call("answer", text="heldout 0"), made.tools))
            found = await made.score()
            return [*(one.observation for one in moved), [(s.name, s.value) for s in found]]

        first, hard, soft, second, judged = asyncio.run(episode())
    finally:
        factory.close()
    assert first.startswith("[] 1 ") and str(os.getpid()) not in first
    assert (hard, soft) == ("error: tool crashed", "error: tool failed with KeyError")
    assert second.startswith("[] 2 ")
    # The step whose worker died left nothing behind.
    assert judged == [("right", 1.0), ("step", 4.0), ("invalid", 0.0)]


def test_what_cannot_be_an_environment_is_refused(own: Path) -> None:
    with pytest.raises(ConfigurationError, match="answer must be one of tool, text, none, got 'no'"):
        world(answer="no")
    with pytest.raises(ConfigurationError, match=r"tasks must be a function .* got int"):
        environment(tasks=7, rewards=[right])  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"has no option hops; there is none"):
        environment_factory(EnvironmentConfig(name=f"{own}:mine", options={"hops": 2}), RewardConfig())


def test_broken_tasks_are_said_when_the_configuration_loads(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("{}\n")
    path = tmp_path / "broken_task.py"
    path.write_text(
        "from slipstream import environment, reward\n"
        "right = reward(1.0)(lambda episode: True)\n"
        f"mine = environment(tasks={str(tmp_path / 't.jsonl')!r}, rewards=[right])\n"
    )
    with pytest.raises(
        ConfigurationError, match=r't\.jsonl, line 1: expected text under "question", got none'
    ):
        environment_factory(EnvironmentConfig(name=f"{path}:mine"), RewardConfig())


def test_a_tool_that_changes_the_episode_is_seen_by_monitors() -> None:
    loud = monitor("log")(lambda episode: len(episode.calls) > 5)
    assert answered(world(rewards=[right, loud]))["fired/<lambda>"].value == 0.0
    assert capitals("heldout", 0)["hint"] == "north"
