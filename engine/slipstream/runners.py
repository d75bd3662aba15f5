"""Floor 4. Who runs a leased episode: the environment's own loop, or an agent program behind a gateway."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slipstream.chat import Chat
from slipstream.config import EnvironmentConfig, RunConfig, StageConfig
from slipstream.config_curriculum import staged
from slipstream.environments import environment_factory
from slipstream.episodes import EpisodeRunner
from slipstream.errors import ConfigurationError
from slipstream.interfaces import InferenceBackend, Runner
from slipstream.programs import OUTSIDE, check_program, load_program
from slipstream.redaction import Redactor
from slipstream.tools.cache import in_folder
from slipstream.types import Lease, Sampling, Trajectory


def configured_runner(
    config: RunConfig, chat: Chat, redactor: Redactor, *, folder: Path | None = None, port: int = 0
) -> Runner:
    """Return the runner that a configuration asks for; raises ConfigurationError.

    folder: of the run whose tool cache it may use; port: where a gateway listens, 0 for a free port.
    """
    environment = config.environment if folder is None else in_folder(config.environment, folder)
    if not config.agent.program:
        real = _episodes(config, chat, redactor, environment)
        stages = [
            _episodes(config, chat, redactor, staged(environment, stage, number), stage)
            for number, stage in enumerate(config.curriculum.stages if config.curriculum.enabled else ())
        ]
        return StagedRunner(real, stages) if stages else real
    factory = environment_factory(environment, config.rewards)
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


class StagedRunner:
    """Runs each episode in the environment of its lease's stage.

    Example: ``StagedRunner(real, [easy, harder])`` runs a lease of stage 0 in `easy`.
    """

    def __init__(self, real: Runner, stages: Sequence[Runner]) -> None:
        """`real` runs what has no stage, evaluations among it."""
        self._real, self._stages = real, stages

    async def sampled(
        self, lease: Lease, backend: InferenceBackend, sampling: Sampling, *, rollout_id: int
    ) -> Trajectory:
        """Run one leased episode with a backend."""
        return await self.of(lease.stage).sampled(lease, backend, sampling, rollout_id=rollout_id)

    def of(self, stage: int) -> Runner:
        """Return what runs the episodes of a stage, or of the real task for -1."""
        return self._real if stage < 0 else self._stages[stage]

    async def start(self) -> str:
        """Get ready; return where agents find a gateway, or ""."""
        for stage in self._stages:
            await stage.start()
        return await self._real.start()

    async def close(self) -> None:
        """End what the environments hold."""
        for runner in (self._real, *self._stages):
            await runner.close()


def stage_of(runner: Runner, stage: int) -> Runner:
    """Return what runs the episodes of a stage, or of the real task for -1."""
    return runner.of(stage) if isinstance(runner, StagedRunner) else runner


def _episodes(
    config: RunConfig,
    chat: Chat,
    redactor: Redactor,
    environment: EnvironmentConfig,
    stage: StageConfig | None = None,
) -> EpisodeRunner:
    """Return the runner of one stage, or of the real task; raises ConfigurationError."""
    factory = environment_factory(environment, config.rewards)
    if stage is not None and stage.tools:
        known = [tool.name for tool in factory.make().tools]
        for name in stage.tools:
            if name not in known:
                raise ConfigurationError(
                    f"curriculum.stages: environment {environment.name} has no tool {name}; there is "
                    f"{', '.join(known)}"
                )
    return EpisodeRunner(
        factory=factory,
        chat=chat,
        environment=environment,
        rewards=config.rewards,
        redactor=redactor,
        tools=stage.tools if stage else (),
        lenient=stage.lenient if stage else 0.0,
    )
