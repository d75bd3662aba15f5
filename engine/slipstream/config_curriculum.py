"""Floor 1. The parts of a run's configuration that say in which order it learns: its curriculum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from slipstream.config_base import Part, Share
from slipstream.config_parts import BatchConfig, ObjectiveConfig, SamplingConfig
from slipstream.config_sentences import hint, sentence
from slipstream.config_tasks import AgentConfig, EnvironmentConfig
from slipstream.errors import ConfigurationError

STAGED = (
    "options", "tool_failure_rate", "tool_latency_s", "tool_schemas", "max_turns", "max_invalid",
    "max_tokens",
)  # fmt: skip
"""What a stage may change of [environment]."""

Demand = tuple[bool, str, str, object]
"""(holds, key, what is expected, what was given)."""


class StageConfig(Part):
    """One stage before the real task."""

    environment: dict[str, Any] = Field(default_factory=dict)
    """What differs from [environment]: options, tool_failure_rate, max_turns and the like."""
    tools: tuple[str, ...] = ()
    """The only tools there are; empty: all."""
    lenient: Share = 0.0
    """An episode whose shaping scores reach this counts as a success; 0: what succeeds in the real task."""
    advance: Share = 0.7
    """Go on to the next stage once so large a share of its episodes succeeds."""
    least_episodes: int = Field(default=256, ge=1)
    """Never leave before so many of its episodes."""


class BandConfig(Part):
    """Which tasks are worth posing: those that are solved now and then."""

    low: float = Field(default=0.1, gt=0.0, lt=1.0)
    high: float = Field(default=0.9, gt=0.0, lt=1.0)
    """Tasks solved less often than `low`, or more often than `high`, are posed less often."""
    floor: float = Field(default=0.1, gt=0.0, le=1.0)
    """Share of them that is posed all the same, however far from the band: they may have come nearer."""
    period: int = Field(default=1, ge=1, le=1 << 20)
    """Tasks whose index differs by a multiple of this share an estimate: the number of training tasks where
    they repeat, that of difficulties where an environment poses them in turn."""
    memory: int = Field(default=64, ge=1)
    """Episodes that an estimate of a task rests on, about: older ones fade."""


class DynamicConfig(Part):
    """What becomes of groups that tell nothing, since all their episodes ended alike."""

    refills: float = Field(default=0.0, ge=0.0)
    """Such groups are replaced, up to this many times batch.groups for each batch; 0: none is."""
    alike: Literal["reward", "success"] = "reward"
    """A group tells nothing when its rewards are all equal, or when all or none of it succeeds."""
    weight: Share = 1.0
    """Weight in the loss of those that are trained all the same."""


class ExplorationConfig(Part):
    """Larger groups, and warmer ones, while groups do not vary."""

    least_group_size: int = Field(default=0, ge=0)
    """Groups begin with so many episodes, and are doubled up to batch.group_size; 0: all have that many."""

    most_temperature: float = Field(default=0.0, ge=0.0)
    """Never above this; 0: the temperature stays what it is."""
    notch: float = Field(default=0.05, gt=0.0)
    """The temperature is raised, or lowered, by so much with a batch."""
    alike_high: Share = 0.6
    """Size and temperature are raised while a larger share of groups tells nothing."""
    alike_low: Share = 0.3
    """Lowered while a smaller one does."""
    kl_radius: float = Field(default=0.2, gt=0.0)
    """The temperature is lowered while kl/reference or kl/exploration, in nats, exceeds this; never raised
    then, nor while they are unknown."""


class CurriculumConfig(Part):
    """From easier stages to the real task, on what the policy can learn from."""

    enabled: bool = False
    """Also allows a warm start below warmup.min_success."""
    stages: tuple[StageConfig, ...] = ()
    """In their order; behind the last one comes the real task, on which every evaluation is made."""
    retreat: Share = 0.05
    """Go back to the stage before once fewer of a stage's episodes succeed."""
    memory: int = Field(default=512, ge=1)
    """Episodes that a stage's success is judged by, about: older ones fade."""
    band: BandConfig = BandConfig()
    dynamic: DynamicConfig = DynamicConfig()
    exploration: ExplorationConfig = ExplorationConfig()


def staged(environment: EnvironmentConfig, stage: StageConfig, number: int) -> EnvironmentConfig:
    """Return the environment of a stage; raises ConfigurationError for what no stage may change."""
    return changed(environment, stage.environment, f"curriculum.stages[{number}].environment")


def changed(environment: EnvironmentConfig, changes: Mapping[str, Any], where: str) -> EnvironmentConfig:
    """Return an environment with changes; raises ConfigurationError for what no stage may change.

    `options` are laid over those of the real task key by key; where: the key that the changes stand under.
    """
    for key in changes:
        if key not in STAGED:
            offered = hint(key, STAGED) or f"; a stage may change {', '.join(STAGED)}"
            raise ConfigurationError(f"{where}: {key} cannot be changed by a stage{offered}")
    options = changes.get("options", {})
    if not isinstance(options, dict):
        raise ConfigurationError(f"{where}.options must be a table, got {options!r}")
    laid = {**environment.model_dump(), **changes, "options": {**environment.options, **options}}
    try:
        return EnvironmentConfig.model_validate(laid)
    except ValidationError as error:
        raise ConfigurationError(sentence(error.errors()[0], where, ())) from None


def least_group_size(curriculum: CurriculumConfig, batch: BatchConfig) -> int:
    """Return the episodes of the smallest groups of a run."""
    return (curriculum.enabled and curriculum.exploration.least_group_size) or batch.group_size


def demands(
    curriculum: CurriculumConfig,
    environment: EnvironmentConfig,
    agent: AgentConfig,
    sampling: SamplingConfig,
    batch: BatchConfig,
    objective: ObjectiveConfig,
) -> Iterator[Demand]:
    """Yield every rule between keys of a curriculum and those of the rest; raises ConfigurationError."""
    if not curriculum.enabled:
        return
    band, exploration = curriculum.band, curriculum.exploration
    yield band.low < band.high, "curriculum.band.low", f"below curriculum.band.high = {band.high}", band.low
    expected = "empty where agent.program plays the episodes: stages change the environment's own loop"
    stages = curriculum.stages
    yield not (stages and agent.program), "curriculum.stages", expected, f"{len(stages)} stages"
    for number, stage in enumerate(stages):
        expected = f"above curriculum.retreat = {curriculum.retreat}, or the run goes to and fro"
        yield (
            stage.advance > curriculum.retreat,
            f"curriculum.stages[{number}].advance",
            expected,
            stage.advance,
        )
        # Backends and micro-batches are laid out for the real task.
        most, length = environment.max_tokens, staged(environment, stage, number).max_tokens
        key = f"curriculum.stages[{number}].environment.max_tokens"
        expected = f"above sampling.max_tokens = {sampling.max_tokens} and at most {most}"
        yield sampling.max_tokens < length <= most, key, expected, length
    low, high = exploration.alike_low, exploration.alike_high
    expected = f"at most curriculum.exploration.alike_high = {high}"
    yield low <= high, "curriculum.exploration.alike_low", expected, low
    warmest = exploration.most_temperature
    expected = f"0, or at least sampling.temperature = {sampling.temperature}"
    key = "curriculum.exploration.most_temperature"
    yield not warmest or warmest >= sampling.temperature, key, expected, warmest
    expected = "0 unless objective.kl_coefficient is positive: nothing else measures the radius"
    yield not warmest or objective.kl_coefficient > 0, key, expected, warmest
    least, size = exploration.least_group_size, batch.group_size
    expected = f"0, or 2 to batch.group_size = {size}"
    yield not least or 2 <= least <= size, "curriculum.exploration.least_group_size", expected, least
    expected = "enough for a group more"
    refills = curriculum.dynamic.refills
    yield not refills or refills * batch.groups >= 1, "curriculum.dynamic.refills", expected, refills
