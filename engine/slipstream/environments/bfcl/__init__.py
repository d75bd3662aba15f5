"""Floor 4. BFCL multi-turn: 800 tasks over eight stateful tool APIs, with the leaderboard's own checks."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

from slipstream.config import EnvironmentConfig, RewardConfig
from slipstream.environments.bfcl.environment import MORE_TOOLS, SYSTEM, BfclEnvironment
from slipstream.environments.bfcl.tasks import SECRET, BfclOptions, BfclTasks, catalogue
from slipstream.environments.factory import ORACLE, EnvironmentFactory, Play, Script
from slipstream.environments.options import read_options
from slipstream.environments.tool_episode import COMPLAINTS, FAULTS
from slipstream.extras import require
from slipstream.tools.hermes import format_call
from slipstream.types import Split, Task

DONE = "That is done."
MISSING = "I cannot do that yet: something it needs is missing."
IDLE = "I cannot help with that."
TRIES = 5
"""Most times that the oracle makes a call which fails by chance."""


def factory(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    """Return what makes the environment; raises ConfigurationError for options and missing packages."""
    require("bfcl", "bfcl_eval", "mpmath", by="environment bfcl")
    options = read_options(BfclOptions, config)
    tasks = BfclTasks(catalogue(), options)
    return EnvironmentFactory(
        tasks=tasks,
        make=lambda: BfclEnvironment(tasks, config, rewards),
        corpus=lambda: corpus(tasks),
        scripts={
            "do_nothing": Script(play=lambda task: nothing(tasks, task), about="calls no tool"),
            ORACLE: Script(play=oracle, about="makes the gold calls one by one"),
        },
        careless=Script(play=hasty, about="makes the first gold call of each turn and calls it done"),
        versions={name: version(name) for name in ("bfcl-eval", "mpmath")},
    )


def oracle(task: Task) -> Play:
    """Play the gold calls, and say what cannot be done."""
    for turn in task.data[SECRET]:
        for name, arguments in turn:
            for _ in range(TRIES):
                said = yield format_call(name, arguments)
                if said not in FAULTS:
                    break
        yield DONE if turn else MISSING


def hasty(task: Task) -> Play:
    """Play the first gold call of each turn, whatever comes of it."""
    for turn in task.data[SECRET]:
        for name, arguments in turn[:1]:
            yield format_call(name, arguments)
        yield DONE if turn else MISSING


def nothing(tasks: BfclTasks, task: Task) -> Play:
    """Talk."""
    for _ in tasks.entry(task).turns:
        yield IDLE


def corpus(tasks: BfclTasks, *, most: int = 200) -> Iterator[str]:
    """Yield text as episodes hold it: tools, questions, calls, results."""
    from slipstream.environments.bfcl.apis import Apis

    yield from (SYSTEM, MORE_TOOLS, DONE, MISSING, IDLE, *FAULTS, *COMPLAINTS)
    for index in range(min(most, tasks.size(Split.TRAIN))):
        task = tasks.task(Split.TRAIN, index)
        entry = tasks.entry(task)
        known = tasks.catalogue.tools_of(entry).values()
        yield from (f"{tool.name}({', '.join(tool.parameters['properties'])})" for tool in known)
        yield from entry.turns
        apis = Apis(entry.apis, entry.setting(), long_context=entry.long_context)
        for name, arguments in (call for turn in task.data[SECRET] for call in turn):
            yield format_call(name, arguments)
            yield apis.call(name, arguments)[0]
