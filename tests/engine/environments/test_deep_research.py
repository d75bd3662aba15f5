"""Deep research: questions out of real text, answered by reading, by nothing else, and always the same."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest

from slipstream.config import EnvironmentConfig, RewardConfig, load_config
from slipstream.environments import EnvironmentFactory, Script, environment_factory
from slipstream.environments.deep_research import DeepResearchEnvironment, passages
from slipstream.environments.deep_research.passages import LISTED, LONGEST, TOPICS, library, words
from slipstream.environments.deep_research.questions import DeepResearchTasks
from slipstream.episodes import EpisodeRunner
from slipstream.errors import ConfigurationError
from slipstream.interfaces import AssistantMessage, Resumable, Transition
from slipstream.model import first_policy
from slipstream.tokenizer import CALL_TOKENS
from slipstream.tools.hermes import parse_call
from slipstream.types import Split, Task, TaskAttempt, ToolStatus, succeeded
from slipstream.warmup import baselines

HOPS = (1, 2, 3)


@pytest.fixture(scope="module")
def made() -> EnvironmentFactory:
    """Two hops, no failures."""
    return factory_of(tool_failure_rate=0.0)


def factory_of(options: dict[str, Any] | None = None, **settings: Any) -> EnvironmentFactory:
    config = EnvironmentConfig(name="deep-research", options=options or {}, **settings)
    return environment_factory(config, RewardConfig(shaping=0.2))


def attempt(task: Task, number: int = 0) -> TaskAttempt:
    return TaskAttempt(task=task.index, seed=1, group=task.index, attempt=number)


async def played(factory: EnvironmentFactory, task: Task, script: Script, *, again: bool = False) -> Any:
    """Play one task; with `again` each step is taken by a new object that goes on from the last state."""
    environment = factory.make()
    await environment.reset(task, attempt(task))
    messages = script.play(task)
    said, transitions = next(messages), list[Transition]()
    for _ in range(40):
        transition = await environment.step(parse_call(said, environment.tools))
        transitions.append(transition)
        if again and isinstance(environment, Resumable):
            state, environment = environment.state(), factory.make()
            assert isinstance(environment, Resumable)
            await environment.restore(task, attempt(task), state)
        if transition.done:
            break
        said = messages.send(transition.observation)
    return await environment.score(), [each.observation for each in transitions]


def success(factory: EnvironmentFactory, script: Script, indices: Sequence[int]) -> float:
    scores = [
        asyncio.run(played(factory, factory.tasks.task(Split.HELDOUT, index), script))[0] for index in indices
    ]
    return sum(map(succeeded, scores)) / len(scores)


def step(environment: DeepResearchEnvironment, name: str, **arguments: str) -> Transition:
    return asyncio.run(environment.step(AssistantMessage(text="", name=name, arguments=arguments)))


def test_the_text_is_pythons_own() -> None:
    shelf = library(TOPICS)
    assert len(shelf.passages) > 1000 and len(set(shelf.passages)) == len(shelf.passages)
    assert "The loop currently controlled by it" not in shelf.passages
    assert any(text.startswith("Assert statements are a convenient way") for text in shelf.passages)
    assert all(len(text) <= LONGEST and "\n" not in text for text in shelf.passages)
    assert library(TOPICS) is shelf and re.fullmatch(r"[0-9a-f]{16}", shelf.digest)


def test_docstrings_are_read_and_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of modules and functions; nothing that others installed, and nothing of broken files."""
    (tmp_path / "site-packages").mkdir()
    body = 'raise SystemExit\ndef f():\n    """Return what {} has counted so far."""\n'
    (tmp_path / "whole.py").write_text('"""The module begins with prose of its own."""\n' + body.format("it"))
    (tmp_path / "broken.py").write_text("def (:\n" + body.format("nobody"))
    (tmp_path / "site-packages" / "other.py").write_text(body.format("somebody"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    read = [" ".join(text.split()) for text in passages._docstrings() if text]
    assert read == ["The module begins with prose of its own.", "Return what it has counted so far."]


@pytest.mark.parametrize("hops", HOPS)
def test_every_question_has_one_answer_and_near_misses(hops: int) -> None:
    """Checked by reading all passages: each pair of neighbours is in one place, and leads on from there."""
    tasks = DeepResearchTasks(TOPICS, hops)
    spelled = [words(text) for text in tasks.library.passages]
    places = Counter(pair for text in spelled for pair in pairwise(text))
    for split in Split:
        for index in range(0, tasks.count(split), 1 + tasks.count(split) // 40):
            task = tasks.task(split, index)
            first, second = task.data["clues"][0]
            near_misses = 0
            for hop, passage in enumerate(task.data["passages"]):
                second = task.data["clues"][hop][-1]
                assert places[first.casefold(), second.casefold()] == 1
                listed = tasks.library.search(f"{first} {second}")
                assert passage in listed and len(listed) <= LISTED
                near_misses += len(listed) - 1
                text = spelled[passage]
                pairs = list(pairwise(text))
                first = text[pairs.index((first.casefold(), second.casefold())) + 2]
            assert first == task.data["answer"].casefold()
            assert near_misses >= (0 if split is Split.TRAIN else hops)
            assert first not in words(task.question)


def test_questions_of_common_words() -> None:
    tasks = DeepResearchTasks(TOPICS, 2, uses=5)
    holding = Counter(word for text in tasks.library.passages for word in set(words(text)))
    for split in Split:
        for index in range(0, tasks.count(split), 1 + tasks.count(split) // 40):
            task = tasks.task(split, index)
            asked = [*(word for clue in task.data["clues"] for word in clue), task.data["answer"]]
            assert min(holding[word.casefold()] for word in asked) >= 5


@pytest.mark.parametrize("hops", HOPS)
def test_splits_share_no_task_and_no_last_passage(hops: int) -> None:
    tasks = DeepResearchTasks(TOPICS, hops)
    posed = {split: [tasks.task(split, i) for i in range(tasks.count(split))] for split in Split}
    assert all(len(found) >= 60 for found in posed.values())
    assert len(posed[Split.TRAIN]) > 4 * len(posed[Split.HELDOUT]), "reading is to be learned, not answers"
    questions = {split: {task.question for task in found} for split, found in posed.items()}
    last = {split: {task.data["passages"][-1] for task in found} for split, found in posed.items()}
    for one, other in combinations(Split, 2):
        assert not questions[one] & questions[other] and not last[one] & last[other]
    for split, found in posed.items():
        answers = Counter(task.data["answer"].casefold() for task in found)
        # Questions for training are many rather than even, see MOST_OF_A_WORD.
        most = 0.05 if split is Split.TRAIN else 0.035
        assert answers.most_common(1)[0][1] / len(found) <= most, "a constant answer must not pay"


def test_tasks_are_always_the_same_and_begin_anew(made: EnvironmentFactory) -> None:
    tasks = DeepResearchTasks(TOPICS, 2)
    count = tasks.count(Split.TRAIN)
    for index in (0, 5, count - 1):
        task, again = tasks.task(Split.TRAIN, index), tasks.task(Split.TRAIN, index + count)
        assert task == made.tasks.task(Split.TRAIN, index)
        assert task.question == again.question and task.data["numbering"] != again.data["numbering"]
    assert tasks.task(Split.TRAIN, 1 << 24).data["answer"]
    assert made.versions == {"text of deep-research": library(TOPICS).digest}


def test_scripts(made: EnvironmentFactory) -> None:
    """Only who checks and reads solves everything; who believes the first passage seldom does."""
    assert made.careless is not None
    found = {name: success(made, script, range(60)) for name, script in made.scripts.items()}
    assert found["oracle"] == found["without_retry"] == 1.0
    assert found["do_nothing"] == 0.0
    assert 0.1 < found["without_check"] < 0.6
    failing = factory_of(tool_failure_rate=0.2)
    assert success(failing, failing.scripts["oracle"], range(20)) == 1.0
    assert success(failing, failing.scripts["without_retry"], range(60)) < 0.5


def test_an_episode_goes_on_in_another_object() -> None:
    factory = factory_of(tool_failure_rate=0.3)
    task = factory.tasks.task(Split.TRAIN, 3)
    oracle = factory.scripts["oracle"]
    whole, broken = (asyncio.run(played(factory, task, oracle, again=again)) for again in (False, True))
    assert whole == broken and succeeded(whole[0])
    shaping = {score.name: score.value for score in whole[0]}["passages"]
    assert shaping == 1.0
    assert any(text.startswith("error: ") for text in whole[1])


def test_neither_question_nor_public_data_tells_the_answer(made: EnvironmentFactory) -> None:
    environment = made.make()
    assert isinstance(environment, DeepResearchEnvironment)
    for index in range(40):
        task = made.tasks.task(Split.TRAIN, index)
        public = {key: value for key, value in task.data.items() if key not in environment.secrets}
        assert set(public) == {"clues", "numbering"}
        assert task.data["answer"].casefold() not in words(f"{public} {task.question}")


def test_tools(made: EnvironmentFactory) -> None:
    environment = made.make()
    assert isinstance(environment, DeepResearchEnvironment)
    task = made.tasks.task(Split.TRAIN, 0)
    asyncio.run(environment.reset(task, attempt(task)))
    query = " ".join(task.data["clues"][0])
    unlisted = [str(number) for number in range(10, 100)]
    assert {step(environment, "open", document=each).observation for each in unlisted} == {
        "error: no such document"
    }
    listed = step(environment, "search", query=query).observation.split("\n")
    assert listed == sorted(listed, key=int) and 1 <= len(listed) <= LISTED
    assert all(len(each) == 2 for each in listed)
    verdicts = [step(environment, "check", document=each).observation for each in listed]
    assert verdicts.count("holds") == 1 and set(verdicts) <= {"holds", "does not hold"}
    right = listed[verdicts.index("holds")]
    assert query.casefold() in step(environment, "open", document=f"{right}").observation.casefold()
    turned = step(environment, "search", query=" ".join(reversed(query.split()))).observation
    assert turned.split("\n") == listed
    assert step(environment, "check", document=right).observation == "does not hold", "the order counts"
    for document in ("", "9", "99999", "-10", "１２", "12 ", "x", "1" * 5000):
        failed = step(environment, "open", document=document)
        assert failed.observation == "error: no such document"
        assert failed.call is not None and failed.call.status is ToolStatus.ERROR
    assert step(environment, "search", query="").observation == "no results"
    assert step(environment, "search", query='" OR xyzzy').observation == "no results"
    step(environment, "note", text="one\n two")
    assert step(environment, "note", text="three").observation == "one two; three"
    assert environment.state()["notes"] == ["one two", "three"]


def test_a_passage_keeps_the_number_of_its_first_listing(made: EnvironmentFactory) -> None:
    """Whatever is searched for in between; no two passages share one, beyond two digits neither."""
    environment = made.make()
    assert isinstance(environment, DeepResearchEnvironment)
    task = made.tasks.task(Split.TRAIN, 1)
    asyncio.run(environment.reset(task, attempt(task)))
    texts: dict[str, str] = {}
    queries = [
        "the statement",
        "a class",
        *sorted({word for text in library(TOPICS).passages for word in words(text)})[::40],
    ]
    for query in [*queries, *queries[:2]]:
        listed = step(environment, "search", query=query).observation.split("\n")
        for number in listed if listed != ["no results"] else []:
            text = step(environment, "open", document=number).observation
            assert texts.setdefault(number, text) == text
    assert len(set(texts.values())) == len(texts) > 100
    assert {len(number) for number in texts} == {2, 3}


def test_a_check_through_the_cache_knows_the_last_search(tmp_path: Path) -> None:
    factory = factory_of(tool_failure_rate=0.0, tool_cache=str(tmp_path / "cache"))
    task = factory.tasks.task(Split.TRAIN, 0)
    oracle = factory.scripts["oracle"]
    first, second = (asyncio.run(played(factory, task, oracle)) for _ in range(2))
    assert first == second and succeeded(first[0])
    plain = factory_of(tool_failure_rate=0.0)
    assert asyncio.run(played(plain, task, plain.scripts["oracle"])) == first
    factory.close()


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    """Prose is read, headings, code and grammar are not; WordNet's glosses are sentences."""
    text = [f"The number{i} river flows through valley{i} towards another sea{i}." for i in range(9)]
    prose = "\n\n".join(text)
    (tmp_path / "a.rst").write_text(f"Heading\n=======\n\n{prose}\n\n    indented code here.\n")
    gloss = "001 03 n 01 dog 0 000 | a friendly animal that barks; an example"
    (tmp_path / "data.noun").write_text(f"{gloss}\n")
    (tmp_path / "b.py").write_text("This is no text that anybody reads here.")
    assert sorted(library(str(tmp_path)).passages) == sorted([*text, "a friendly animal that barks."])
    with pytest.raises(ConfigurationError, match="too little text for questions of 2 hops"):
        factory_of({"corpus": str(tmp_path)})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"corpus": "/no/folder"},
            "expected 'python-topics', 'python-help' or an existing folder, got '/no/folder'",
        ),
        ({"hops": 9}, "environment.options: hops"),
        ({"corpsu": "x"}, "has no option corpsu; did you mean corpus"),
    ],
)
def test_a_mistake_is_one_sentence(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        factory_of(options)
    assert told in str(caught.value)


def test_an_empty_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="which holds no sentence"):
        factory_of({"corpus": str(tmp_path)})


@pytest.mark.slow
def test_the_script_of_the_recipe_solves_its_tasks_within_its_limits() -> None:
    """With the tokens of the recipe's tokenizer, where nothing is cut off."""
    config = load_config("deep-research", ["evaluation.final_tasks=80"])
    factory = environment_factory(config.environment, config.rewards)
    policy = first_policy(config, factory.corpus())
    runner = EpisodeRunner(
        factory=factory, chat=policy.chat, environment=config.environment, rewards=config.rewards
    )
    found = {name: told["success"] for name, told in baselines(runner, config).items()}
    assert found["oracle"] == 1.0 and found["do_nothing"] == 0.0
    assert 0.5 < float(found["without_retry"]) < 0.9
    assert len(policy.tokenizer) <= config.model.vocabulary + len(CALL_TOKENS)
