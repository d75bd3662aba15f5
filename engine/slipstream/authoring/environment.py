"""Floor 4. `environment(...)`: tools, rewards and tasks of one's own as an environment of a run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from slipstream.authoring.episode import Episode
from slipstream.authoring.folders import dataset
from slipstream.authoring.play import Answers, AuthoredEnvironment, Design, ResumableEnvironment
from slipstream.authoring.rewards import Judge, check_judges
from slipstream.authoring.tasks import GeneratedTasks, jsonl, listed
from slipstream.authoring.tools import Tool, tool
from slipstream.config import EnvironmentConfig, Part, RewardConfig
from slipstream.environments.factory import ORACLE, EnvironmentFactory, Play, Script
from slipstream.environments.options import read_options
from slipstream.errors import ConfigurationError
from slipstream.interfaces import Environment, TaskSource
from slipstream.tools.hermes import parse_call
from slipstream.types import Split, Task, TaskAttempt

Player = Callable[[Task], Play]
CORPUS_EPISODES: Final = 512
"""Episodes of the oracle whose text a tokenizer of one's own is trained on."""
_MESSAGES: Final = 64


class NoOptions(Part):
    """An environment without keys of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Authored:
    """An environment before its configuration is known: called with it, it is an `EnvironmentFactory`."""

    design: Design
    tasks: TaskSource
    scripts: Mapping[str, Script]
    careless: Script | None
    versions: Mapping[str, str]
    resumable: bool

    def __call__(self, config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
        """Return the factory; raises ConfigurationError for weights that outcomes do not dominate."""
        read_options(NoOptions, config)
        check_judges(self.design.judges, rewards)
        kind = ResumableEnvironment if self.resumable else AuthoredEnvironment
        # The script knows no way around seeded failures, and its text needs none.
        calm = config.model_copy(update={"tool_failure_rate": 0.0, "tool_latency_s": 0.0})
        return EnvironmentFactory(
            tasks=self.tasks,
            make=lambda: kind(self.design, config, rewards),
            corpus=lambda: self._corpus(lambda: kind(self.design, calm, rewards)),
            scripts=self.scripts,
            careless=self.careless,
            versions=self.versions,
        )

    def _corpus(self, make: Callable[[], Environment]) -> Iterator[str]:
        """Yield the text of the oracle's episodes, or the questions where there is no oracle."""
        oracle = self.scripts.get(ORACLE)
        for index in range(CORPUS_EPISODES):
            task = self.tasks.task(Split.TRAIN, index)
            yield from (self.design.system, task.question)
            if oracle is not None:
                yield from asyncio.run(_played(make(), task, oracle.play(task)))


def environment(
    *,
    tasks: TaskSource | str | Path | Sequence[Mapping[str, Any]] | Callable[[Split, int], Mapping[str, Any]],
    tools: Sequence[Tool | Callable[..., Any]] = (),
    rewards: Sequence[Judge],
    system: str = "",
    setup: Callable[[Episode], Any] | None = None,
    answer: Answers = "tool",
    oracle: Player | None = None,
    careless: Player | None = None,
    scripts: Mapping[str, Player] | None = None,
    secrets: Collection[str] = ("answer",),
    versions: Mapping[str, str] | None = None,
    resumable: bool = True,
) -> Authored:
    """Make an environment: ``environment.name=my_task.py:NAME`` trains on it.

    tasks      a function (split, index) -> {"question": ..., ...}, dictionaries, the path of a JSONL file or
               of a dataset's folder, or a TaskSource
    rewards    what @reward, @metric and @monitor made
    setup      called with the Episode at its start, to fill `episode.state`
    answer     "tool": a tool `answer(text)` ends the episode, unless one of yours has that name; "text": a
               message without a call does; "none": your tools do, with `episode.end()`
    oracle     a generator of a Task that yields calls (`tool_call`) and is sent results: a baseline, and what
               the warm start imitates; `careless` gives the demonstrations with mistakes, `scripts` are
               baselines
    secrets    keys of a task's data that rewards alone may read; tools do not see them
    versions   packages and data that results depend on, by name
    resumable  whether `episode.state` is plain data, which retries and the sandbox need

    Raises ConfigurationError for what cannot work; weights are looked at when the configuration is known.
    """
    if answer not in get_args(Answers):
        raise ConfigurationError(
            f"environment: answer must be one of {', '.join(get_args(Answers))}, got {answer!r}"
        )
    named: dict[str, Tool] = {}
    for given in tools:
        made = given if isinstance(given, Tool) else tool(given)
        if made.name in named:
            raise ConfigurationError(f"environment: two tools are called {made.name}; rename one")
        named[made.name] = made
    players = {**(scripts or {}), **({ORACLE: oracle} if oracle else {})}
    design = Design(
        tools=named,
        judges=tuple(rewards),
        system=system,
        setup=setup,
        answers=answer,
        secrets=frozenset(secrets),
    )
    return Authored(
        design=design,
        tasks=_tasks(tasks),
        scripts={name: _script(name, player) for name, player in players.items()},
        careless=_script("careless", careless) if careless else None,
        versions=dict(versions or {}),
        resumable=resumable,
    )


def _tasks(given: Any) -> TaskSource:
    if isinstance(given, str | Path):
        return dataset(given) if Path(given).is_dir() else jsonl(given)
    if hasattr(given, "task"):
        source: TaskSource = given
        return source
    if callable(given):
        return GeneratedTasks(given)
    if isinstance(given, Sequence):
        return listed(given)
    raise ConfigurationError(
        "environment: tasks must be a function (split, index) -> dict, a list of dictionaries, the path of a "
        f"JSONL file or of a dataset's folder, or a TaskSource, got {type(given).__name__}"
    )


def _script(name: str, player: Player) -> Script:
    about = " ".join((player.__doc__ or name).split("\n\n")[0].split()).rstrip(".")
    return Script(play=player, about=about)


async def _played(environment: Environment, task: Task, play: Play) -> list[str]:
    """Return what is said in an episode that a script plays."""
    attempt = TaskAttempt(task=task.index, seed=0, group=task.index, attempt=0)
    await environment.reset(task, attempt)
    said, observation = list[str](), ""
    for number in range(_MESSAGES):
        try:
            text = next(play) if number == 0 else play.send(observation)
        except StopIteration:
            break
        moved = await environment.step(parse_call(text, environment.tools, plain=True))
        observation = moved.observation
        said += [text, observation]
        if moved.done:
            break
    return said
