"""The research world: solvable by reading, by nothing else, and always the same."""

from __future__ import annotations

import asyncio
import re

import pytest

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments.research import (
    TASKS_PER_WORLD,
    ResearchEnvironment,
    ResearchOptions,
    ResearchTasks,
    World,
    build_world,
    corpus,
    factory,
)
from slipstream.errors import ConfigurationError
from slipstream.interfaces import AssistantMessage
from slipstream.types import ScoreKind, Split, Task, TaskAttempt, ToolStatus

SHAPES = [(hops, documents) for hops in (1, 2, 4, 8) for documents in (1, 3, 8)]


def options(hops: int = 1, documents: int = 3) -> ResearchOptions:
    return ResearchOptions(hops=hops, documents_per_fact=documents)


def attempt(number: int = 0, task: int = 0) -> TaskAttempt:
    return TaskAttempt(task=task, seed=1, group=task, attempt=number)


def told(world: World, title: str) -> list[str]:
    return [document.body for document in world.documents if document.title == title]


@pytest.mark.parametrize(("hops", "documents"), SHAPES)
def test_each_fact_is_told_once_among_its_near_misses(hops: int, documents: int) -> None:
    for number in range(5):
        world = build_world(Split.TRAIN, number, options(hops, documents))
        assert len(world.people) >= TASKS_PER_WORLD
        assert len({d.identifier for d in world.documents}) == len(world.documents)
        for index, (person, home) in enumerate(zip(world.people, world.homes, strict=True)):
            bodies = told(world, f"{person} home")
            assert len(bodies) == documents
            assert bodies.count(f"{person} lives in {home}.") == 1
            assert sum("lives in" in body for body in bodies) == 1
            # A near miss never names the answer.
            assert sum(home in body for body in bodies) == 1
            if hops > 1:
                boss = world.people[(index + 1) % len(world.people)]
                bodies = told(world, f"{person} manager")
                assert len(bodies) == documents
                assert bodies.count(f"{boss} is the manager of {person}.") == 1
                assert sum(boss in body for body in bodies) == 1


def test_tasks_chain_more_and_more_facts_in_turn() -> None:
    tasks = ResearchTasks(ResearchOptions(hops=3, least_hops=1))
    shown = [tasks.task(Split.TRAIN, index) for index in range(7)]
    assert [task.question.count("the manager of") for task in shown] == [0, 1, 2, 0, 1, 2, 0]
    assert [len(task.data["facts"]) for task in shown] == [task.data["hops"] for task in shown]
    assert [task.data["hops"] for task in shown] == [1, 2, 3, 1, 2, 3, 1]
    same = ResearchTasks(options(hops=3)).task(Split.TRAIN, 2)
    assert same == shown[2], "a task is the same wherever it chains as many"


def test_at_least_more_than_most_hops_is_refused() -> None:
    config = EnvironmentConfig(options={"hops": 1, "least_hops": 2})
    with pytest.raises(
        ConfigurationError, match=r"^environment\.options\.least_hops must be at most hops = 1, got 2$"
    ):
        factory(config, RewardConfig())


@pytest.mark.parametrize(("hops", "documents"), SHAPES)
def test_following_the_facts_leads_to_the_answer(hops: int, documents: int) -> None:
    tasks = ResearchTasks(options(hops, documents))
    for index in range(2 * TASKS_PER_WORLD):
        task = tasks.task(Split.HELDOUT, index)
        world, store = tasks.world(Split.HELDOUT, task.data["world"])
        subject = task.data["person"]
        chain = [d.identifier for d in world.documents if d.identifier in task.data["facts"]]
        assert len(chain) == hops
        for _ in range(hops - 1):
            (line,) = [b for b in told(world, f"{subject} manager") if "is the manager" in b]
            subject = line.split(" is the manager")[0]
        (line,) = [b for b in told(world, f"{subject} home") if "lives in" in b]
        assert line == f"{subject} lives in {task.data['answer']}."
        assert {store.open(i) for i in chain} >= {line}
        assert task.question == f"Where does {'the manager of ' * (hops - 1)}{task.data['person']} live?"


def test_tasks_are_the_same_for_ever() -> None:
    """Literal: another draw of worlds would make old runs, checkpoints and figures incomparable."""
    one = ResearchTasks(options()).task(Split.TRAIN, 17)
    assert one == ResearchTasks(options()).task(Split.TRAIN, 17)
    assert (one.question, one.data["answer"], one.data["facts"]) == GOLDEN


GOLDEN = ("Where does Lena Holm live?", "Lima", ("31",))


def test_splits_share_no_world() -> None:
    worlds = [build_world(split, n, options()) for split in Split for n in range(50)]
    assert len({(world.people, world.homes) for world in worlds}) == 150
    # Names recur with other facts: nothing can be learned by heart.
    homes: dict[str, set[str]] = {}
    for world in worlds:
        for person, home in zip(world.people, world.homes, strict=True):
            homes.setdefault(person, set()).add(home)
    again = [cities for cities in homes.values() if len(cities) > 1]
    assert len(again) > len(homes) / 2


def results(number: int, rate: float = 0.5, calls: int = 40) -> list[str]:
    """What one attempt's tools return to the same calls."""
    setting = EnvironmentConfig(tool_failure_rate=rate)
    tasks = ResearchTasks(options())
    environment = ResearchEnvironment(tasks, setting, RewardConfig())

    async def play() -> list[str]:
        task = tasks.task(Split.TRAIN, 3)
        await environment.reset(task, attempt(number))
        message = AssistantMessage(text="", name="search", arguments={"query": f"{task.data['person']} home"})
        return [(await environment.step(message)).observation for _ in range(calls)]

    return asyncio.run(play())


def test_failures_repeat_for_an_attempt_and_differ_between_attempts() -> None:
    assert results(0) == results(0)
    assert results(0) != results(1)
    assert {r for n in range(5) for r in results(n) if r.startswith("error")} == {
        "error: timeout",
        "error: unavailable",
        "error: rate limit",
    }


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_failures_have_their_rate(rate: float) -> None:
    failed = [r.startswith("error") for n in range(10) for r in results(n, rate, calls=200)]
    assert sum(failed) / 2000 == pytest.approx(rate, abs=0.02)


async def played(
    messages: list[AssistantMessage], *, hops: int = 1, **setting: float
) -> tuple[Task, list[object], dict[str, float]]:
    made = EnvironmentConfig(tool_failure_rate=0.0, **setting)
    tasks = ResearchTasks(options(hops))
    environment = ResearchEnvironment(tasks, made, RewardConfig(shaping=0.1))
    task = tasks.task(Split.TRAIN, 3)
    await environment.reset(task, attempt())
    steps = []
    for message in messages:
        filled = {
            k: v.format(**task.data, fact=task.data["facts"][0]) for k, v in (message.arguments or {}).items()
        }
        step = AssistantMessage(text="", name=message.name, arguments=filled or None, error=message.error)
        steps.append(await environment.step(step))
    scores = await environment.score()
    return task, list(steps), {s.name: s.weight * (s.value or 0.0) for s in scores}


def call(name: str, argument: str, value: str) -> AssistantMessage:
    return AssistantMessage(text="", name=name, arguments={argument: value})


@pytest.mark.parametrize(
    ("answer", "outcome"), [("{answer}", 1.0), (" {answer} ", 1.0), ("unknown", -1.0), ("", -1.0)]
)
def test_scores(answer: str, outcome: float) -> None:
    messages = [
        AssistantMessage(text="", error="no tool call"),
        call("search", "query", "{person} home"),
        call("open", "document", "{fact}"),
        call("answer", "text", answer),
    ]
    _, steps, scores = asyncio.run(played(messages))
    assert scores == pytest.approx({"outcome": outcome, "step": -0.2, "invalid": -0.2, "facts": 0.1})
    assert [step.done for step in steps] == [False, False, False, True]
    assert [step.reward for step in steps] == pytest.approx([-0.25, -0.05, -0.05, -0.05])
    assert steps[0].observation == "error: no tool call" and steps[0].call is None
    assert [step.call.status for step in steps[1:]] == [ToolStatus.OK] * 3


def test_without_an_answer_the_outcome_is_minus_one() -> None:
    _, steps, scores = asyncio.run(played([call("open", "document", "9")]))
    assert steps[0].observation == "error: no such document"
    assert steps[0].call.status is ToolStatus.ERROR
    assert scores == pytest.approx({"outcome": -1.0, "step": -0.05, "invalid": 0.0, "facts": 0.0})


def test_latency_is_measured() -> None:
    _, steps, _ = asyncio.run(played([call("open", "document", "9")], tool_latency_s=0.03))
    assert steps[0].call.latency_s >= 0.03


def test_only_one_score_is_an_outcome() -> None:
    tasks = ResearchTasks(options())
    environment = ResearchEnvironment(tasks, EnvironmentConfig(), RewardConfig())

    async def kinds() -> list[ScoreKind]:
        await environment.reset(tasks.task(Split.TRAIN, 0), attempt())
        return [score.kind for score in await environment.score()]

    assert asyncio.run(kinds()).count(ScoreKind.OUTCOME) == 1


def test_the_corpus_shows_every_kind_of_text() -> None:
    text = "\n".join(corpus(options(2), worlds=2))
    for part in (
        "lives in",
        "was in",
        "is the manager of",
        "left the team of",
        "error: rate limit",
        '"document": "',
    ):
        assert part in text
    assert re.search(r"Where does the manager of \w+ \w+ live\?", text)
