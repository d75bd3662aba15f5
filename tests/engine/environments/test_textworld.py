"""Text games: won by the game's own word, in one Java process that may die."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Iterator

import psutil
import pytest
from worlds import attempt, equal_in_pieces, factory_of, played, step, success

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments import EnvironmentFactory, environment_factory
from slipstream.environments.textworld import FOLDS, GAMES, SEEDS
from slipstream.errors import ConfigurationError, InfrastructureError
from slipstream.tools import java_games
from slipstream.tools.hermes import format_call
from slipstream.types import Split

pytest.importorskip("textworld_express")
# py4j leaves sockets of a machine that died to the garbage collector, which may find them in any test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
if shutil.which("java") is None:
    pytest.skip("there is no Java here", allow_module_level=True)


SMALL = "numLocations=2,includeDoors=0"


@pytest.fixture(scope="module")
def coin() -> Iterator[EnvironmentFactory]:
    made = factory_of("textworld:coin", parameters=SMALL)
    # The process that they share is started here, for it outlives each test.
    played(made, made.tasks.task(Split.TRAIN, 0), [])
    yield made
    made.close()


def java() -> set[psutil.Process]:
    return {child for child in psutil.Process().children() if child.name() == "java"}


def act(command: str) -> str:
    return format_call("act", {"command": command})


def test_the_game_is_won_by_its_own_path_and_by_nothing_else(coin: EnvironmentFactory) -> None:
    assert success(coin, coin.scripts["oracle"], 8) == 1.0
    assert success(coin, coin.scripts["do_nothing"], 1) == 0.0


def test_what_a_game_says_and_how_it_scores(coin: EnvironmentFactory) -> None:
    task = coin.tasks.task(Split.TRAIN, 0)
    assert task.data == {"seed": 0, "fold": "train"}
    moves, scores = played(coin, task, [act("fly to the moon"), act("look around"), "nothing"])
    assert moves[0].observation.startswith("Unknown action: ")
    assert "\nValid commands: " in moves[1].observation and "; look around" in moves[1].observation
    assert moves[2].observation == "error: no tool call"
    assert {score.name: score.value for score in scores} == {
        "outcome": -1.0, "step": 3.0, "invalid": 1.0, "progress": 0.0,
    }  # fmt: skip


def test_games_repeat_and_go_on_from_any_state(coin: EnvironmentFactory) -> None:
    task = coin.tasks.task(Split.HELDOUT, 5)
    texts = [act(command) for command in ("look around", "inventory", "move north", "take coin", "nonsense")]
    first, second = (played(coin, task, texts) for _ in range(2))
    assert [m.observation for m in first[0]] == [m.observation for m in second[0]]
    failing = factory_of("textworld:coin", tool_failure_rate=0.4, parameters="numLocations=2,includeDoors=0")
    assert equal_in_pieces(failing, task, attempt(5), texts * 2)
    failing.close()


def test_the_way_through_a_game_is_the_same_each_time_it_is_asked_for() -> None:
    games = java_games.Games("coin", "")
    for seed in (24, 29, 36):
        assert games._gold(seed, "train") == games._gold(seed, "train")
    games.close()


def test_folds_are_the_splits(coin: EnvironmentFactory) -> None:
    for split, (fold, first) in FOLDS.items():
        data = [coin.tasks.task(split, index).data for index in (0, SEEDS - 1, SEEDS)]
        assert [entry["seed"] for entry in data] == [first, first + SEEDS - 1, first]
        assert {entry["fold"] for entry in data} == {fold}


def test_a_dead_machine_fails_one_call_and_another_takes_its_place() -> None:
    coin = factory_of("textworld:coin", parameters=SMALL)

    others = java()

    async def episode() -> str:
        environment = coin.make()
        task = coin.tasks.task(Split.TRAIN, 3)
        await environment.reset(task, attempt(3))
        before = environment.state()
        for child in java() - others:
            child.kill()
            child.wait(timeout=20)
        with pytest.raises(InfrastructureError, match=r"^java: "):
            await step(environment, act("look around"))
        await environment.restore(task, attempt(3), before)
        move = await step(environment, act("look around"))
        await environment.close()
        return move.observation

    assert asyncio.run(episode()).startswith("You are in ")
    coin.close()


def test_mistakes_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, said in (
        ("textworld", "expected a game of textworld, as in textworld:coin, got textworld"),
        ("textworld:coins", "did you mean coin?"),
    ):
        with pytest.raises(ConfigurationError, match=re.escape(said)):
            environment_factory(EnvironmentConfig(name=name), RewardConfig())
    wrong = factory_of("textworld:coin", parameters="numSuns=2")
    with pytest.raises(ConfigurationError, match="coin refuses its parameters"):
        played(wrong, wrong.tasks.task(Split.TRAIN, 0), [])
    wrong.close()
    monkeypatch.setattr(java_games.shutil, "which", lambda name: None)
    with pytest.raises(ConfigurationError, match="apt-get install default-jre-headless"):
        factory_of("textworld:coin")


@pytest.mark.slow
@pytest.mark.parametrize("game", GAMES)
def test_every_game_is_won_by_its_own_path(game: str) -> None:
    factory = factory_of(f"textworld:{game}")
    assert success(factory, factory.scripts["oracle"], 5) == 1.0
    factory.close()
