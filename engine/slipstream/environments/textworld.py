"""Floor 4. Text games of TextWorldExpress, one for each variant: act(command), until the game is won or lost.

The game's own folds are the splits: train, dev and test have words, recipes and places of their own. A game
is restored by playing its commands again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

from pydantic import Field

from slipstream.config import EnvironmentConfig, Part, RewardConfig
from slipstream.config_sentences import hint
from slipstream.environments import variant_of
from slipstream.environments.factory import ORACLE, EnvironmentFactory, Play, Script
from slipstream.environments.options import read_options
from slipstream.environments.scripted import EXPERT, WITHOUT_RETRY, GaveUp, Habits, insist
from slipstream.environments.tool_episode import COMPLAINTS, FAULTS, Result, ToolEpisode, failed, tool
from slipstream.errors import ConfigurationError, ToolError
from slipstream.interfaces import Observation, ToolSpec
from slipstream.tools.hermes import format_call
from slipstream.tools.java_games import Game, Games
from slipstream.types import Score, ScoreKind, Split, Task, TaskAttempt

GAMES: Final = (
    "arithmetic", "coin", "cookingworld", "mapreader", "peckingorder", "simonsays", "sorting", "twc",
)  # fmt: skip
FOLDS: Final = {Split.TRAIN: ("train", 0), Split.HELDOUT: ("dev", 10_000), Split.FRESH: ("test", 20_000)}
"""The package's name of each fold, and its first seed."""
SEEDS: Final = 1000
"""Of a fold; tasks beyond them begin again with the first."""
TOOLS: Final = (tool("act", "Carry out a command in the game", "command"),)
LOOK: Final = format_call("act", {"command": "look around"})


class TextWorldOptions(Part):
    """How the game is set, and what is shown of it."""

    parameters: str = Field(default="", pattern=r"^(\w+=\w+(,\s*\w+=\w+)*)?$")
    """The game's own, as in "numLocations=3,includeDoors=0"; empty: its defaults."""
    valid_actions: bool = True
    """Show all commands that the game takes next."""


def factory(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    """Return what makes the environment of a game; raises ConfigurationError."""
    options = read_options(TextWorldOptions, config)
    name = variant_of(config)
    if name not in GAMES:
        near = hint(name, list(GAMES)) or f"; there are {', '.join(GAMES)}"
        raise ConfigurationError(
            f"environment.name: expected a game of textworld, as in textworld:coin, got {config.name}{near}"
        )
    games = Games(name, options.parameters)

    def script(habits: Habits, about: str) -> Script:
        return Script(play=lambda task: win(task, games, habits), about=about)

    return EnvironmentFactory(
        tasks=TextWorldTasks(name),
        make=lambda: TextWorldEnvironment(games, options, config, rewards),
        corpus=corpus,
        scripts={
            "do_nothing": Script(play=lambda task: look_on(), about="looks around for ever"),
            "without_retry": script(WITHOUT_RETRY, "plays to win, looks on after the first error"),
            ORACLE: script(EXPERT, "plays to win and retries"),
        },
        careless=script(WITHOUT_RETRY, "plays to win, looks on after the first error"),
        versions={"textworld-express": version("textworld-express")},
        close=games.close,
    )


class TextWorldTasks:
    """Games of one kind by fold and seed."""

    def __init__(self, game: str) -> None:
        self._game = game

    def task(self, split: Split, index: int) -> Task:
        """Return the game at `index` of a split's fold; the game itself says what is to be done."""
        fold, first = FOLDS[split]
        seed = first + index % SEEDS
        return Task(
            split=split, index=index, question=f"{self._game} {seed}", data={"seed": seed, "fold": fold}
        )


class TextWorldEnvironment(ToolEpisode):
    """One game."""

    tools: Sequence[ToolSpec] = TOOLS
    secrets: Collection[str] = ()

    def __init__(
        self, games: Games, options: TextWorldOptions, config: EnvironmentConfig, rewards: RewardConfig
    ) -> None:
        super().__init__(config, rewards)
        self._games, self._options = games, options
        self._game: Game | None = None
        self._commands: list[str] = []
        self._last: dict[str, Any] = {}

    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        """Generate the game."""
        await super().reset(task, attempt)
        self._game, self._last = await self._games.begin(task.data["seed"], task.data["fold"])
        self._commands = []
        return Observation(system="", user=f"{self._game.task}\n{self._shown()}")

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Carry a command out."""
        try:
            await self._act(arguments["command"])
        except ToolError as error:
            return failed(str(error))
        return Result(text=self._shown(), done=self._ended())

    def right(self) -> bool:
        """Tell whether the game says that it is won."""
        return bool(self._last["tasksuccess"])

    def more_scores(self) -> Sequence[Score]:
        """Shaping by the game's own score, the share of the way to its end."""
        share = min(1.0, max(0.0, float(self._last["score"])))
        return (
            Score(name="progress", kind=ScoreKind.SHAPING, weight=self._rewards.shaping, value=share),
        )  # fmt: skip

    def memory(self) -> dict[str, Any]:
        """Return the commands so far."""
        return {"commands": list(self._commands)}

    def remember(self, memory: dict[str, Any]) -> None:
        """Take no more up than `restore` does by playing."""

    async def restore(self, task: Task, attempt: TaskAttempt, state: dict[str, Any]) -> None:
        """Play the commands again."""
        await self.close()
        await super().restore(task, attempt, state)
        for command in state["commands"]:
            await self._act(command)

    async def close(self) -> None:
        """Leave the game to another episode."""
        game, self._game = self._game, None
        if game is not None:
            self._games.end(game)

    async def _act(self, command: str) -> None:
        # A call that is cut off goes on in its thread: then nobody else may have the game.
        game, self._game = self._game, None
        assert game is not None
        try:
            self._last = await game.step(command)
        except ToolError:
            self._game = game
            raise
        self._game = game
        self._commands.append(command)

    def _ended(self) -> bool:
        return bool(self._last["tasksuccess"] or self._last["taskfailure"])

    def _shown(self) -> str:
        text = str(self._last["observation"]).strip()
        if not self._options.valid_actions:
            return text
        return f"{text}\nValid commands: {'; '.join(sorted(self._last['validActions']))}"


def win(task: Task, games: Games, habits: Habits) -> Play:
    """Play one episode along the path that the game itself gives."""
    try:
        for command in games.gold(task.data["seed"], task.data["fold"]):
            yield from insist(format_call("act", {"command": command}), habits)
    except GaveUp:
        pass
    yield from look_on()


def look_on() -> Play:
    """Play one episode without doing anything."""
    while True:
        yield LOOK


def corpus() -> Iterator[str]:
    """Yield the calls and errors of episodes; the games' own words need a tokenizer that knows English."""
    yield "Tools: act(command)"
    yield from (*FAULTS, *COMPLAINTS, LOOK)
