"""Floor 4. Who runs a leased episode: the environment's own loop, or an agent program behind a gateway."""

from __future__ import annotations

from slipstream.chat import Chat
from slipstream.config import RunConfig
from slipstream.environments import environment_factory
from slipstream.episodes import EpisodeRunner
from slipstream.interfaces import Runner
from slipstream.programs import check_program, load_program
from slipstream.redaction import Redactor


def configured_runner(config: RunConfig, chat: Chat, redactor: Redactor) -> Runner:
    """Return the runner that a configuration asks for; raises ConfigurationError."""
    factory = environment_factory(config.environment, config.rewards)
    if not config.agent.program:
        return EpisodeRunner(
            factory=factory,
            chat=chat,
            environment=config.environment,
            rewards=config.rewards,
            redactor=redactor,
        )
    check_program(config.agent.program)
    from slipstream.gateway.program import ProgramRunner

    return ProgramRunner(
        load_program(config.agent.program),
        tasks=factory.tasks,
        chat=chat,
        environment=config.environment,
        rewards=config.rewards,
        redactor=redactor,
    )
