"""Floor 4. Who runs a leased episode: the environment's own loop, or an agent program behind a gateway."""

from __future__ import annotations

from pathlib import Path

from slipstream.chat import Chat
from slipstream.config import RunConfig
from slipstream.environments import environment_factory
from slipstream.episodes import EpisodeRunner
from slipstream.interfaces import Runner
from slipstream.programs import OUTSIDE, check_program, load_program
from slipstream.redaction import Redactor
from slipstream.tools.cache import in_folder


def configured_runner(
    config: RunConfig, chat: Chat, redactor: Redactor, *, folder: Path | None = None, port: int = 0
) -> Runner:
    """Return the runner that a configuration asks for; raises ConfigurationError.

    folder: of the run whose tool cache it may use; port: where a gateway listens, 0 for a free port.
    """
    environment = config.environment if folder is None else in_folder(config.environment, folder)
    factory = environment_factory(environment, config.rewards)
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

    program = config.agent.program
    return ProgramRunner(
        None if program == OUTSIDE else load_program(program),
        tasks=factory.tasks,
        chat=chat,
        environment=config.environment,
        rewards=config.rewards,
        malformed_calls=config.agent.malformed_calls,
        redactor=redactor,
        port=port,
        # When a lease's time is over, another actor gets it.
        patience_s=config.hub.lease_timeout_s / 2,
    )
