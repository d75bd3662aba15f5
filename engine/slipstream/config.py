"""Floor 1. The configuration of a run: frozen models, one TOML file, dotted overrides.

Defaults are vetted on the `research` recipes. Unknown keys are errors that name the
file, the key and the nearest valid key. Loading opens the recipe's file and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tomli_w
from pydantic import Field, ValidationError, model_validator

from slipstream.addresses import stays_on_machine
from slipstream.config_base import Part
from slipstream.config_curriculum import CurriculumConfig, StageConfig, changed, least_group_size
from slipstream.config_curriculum import demands as demands_of_curriculum
from slipstream.config_parts import (
    ActorConfig,
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    HubConfig,
    InferenceConfig,
    LearnerConfig,
    ModelConfig,
    MonitorConfig,
    ObjectiveConfig,
    OptimConfig,
    SamplingConfig,
    SupervisionConfig,
    TrackingConfig,
    WarmupConfig,
)
from slipstream.config_sentences import hint, sentence
from slipstream.config_tasks import (
    AgentConfig,
    EnvironmentConfig,
    RewardConfig,
    SandboxConfig,
    check_outcome_dominates,
)
from slipstream.errors import ConfigurationError

__all__ = [
    "ActorConfig",
    "AgentConfig",
    "BatchConfig",
    "CheckpointConfig",
    "CurriculumConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "HubConfig",
    "InferenceConfig",
    "LearnerConfig",
    "ModelConfig",
    "MonitorConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "Part",
    "RewardConfig",
    "RunConfig",
    "SamplingConfig",
    "SandboxConfig",
    "StageConfig",
    "SupervisionConfig",
    "TrackingConfig",
    "WarmupConfig",
    "configured",
    "dump",
    "load_config",
    "read",
    "save",
    "shipped_recipes",
]

RECIPES = Path(__file__).parent / "recipes"
"""Folder of the shipped recipes."""
FREE_TABLES = ("environment.options.", "warmup.environment.")
"""Their keys are not known here: the environment checks its options when it is made, `changed` the other."""
RENAMED = {
    "environment.hops": "environment.options.hops",
    "environment.documents_per_fact": "environment.options.documents_per_fact",
}


class RunConfig(Part):
    """A whole run."""

    seed: int = Field(default=1, ge=0)
    steps: int = Field(default=200, ge=1)
    max_slip: int = Field(default=4, ge=0)
    """How many versions old a token may be when it is trained."""
    device: str = "auto"
    """"auto" takes a GPU where there is one."""
    stall_timeout_s: float = Field(default=600.0, gt=0.0)
    """A process that shows no sign of life for so long is killed, with a report in the folder `flight`."""
    environment: EnvironmentConfig = EnvironmentConfig()
    agent: AgentConfig = AgentConfig()
    inference: InferenceConfig = InferenceConfig()
    model: ModelConfig = ModelConfig()
    warmup: WarmupConfig = WarmupConfig()
    sampling: SamplingConfig = SamplingConfig()
    actor: ActorConfig = ActorConfig()
    batch: BatchConfig = BatchConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    rewards: RewardConfig = RewardConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    optim: OptimConfig = OptimConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    monitors: MonitorConfig = MonitorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    hub: HubConfig = HubConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        """Refuse combinations that cannot work, so that no half-made configuration exists."""
        for holds, key, expected, got in _demands(self):
            if not holds:
                raise ConfigurationError(f"{key} must be {expected}, got {got}")
        smallest = least_group_size(self.curriculum, self.batch)
        check_outcome_dominates(self.rewards, self.objective, smallest)
        return self


Demand = tuple[bool, str, str, object]
"""Whether a rule between keys holds, the key, what is expected of it, what was given."""


def _demands(config: RunConfig) -> Iterator[Demand]:
    """Yield every rule between keys."""
    yield from _demands_of_batches(config)
    yield from _demands_of_the_policy(config)
    yield from _demands_of_addresses(config)
    cache, sandbox = config.environment.tool_cache, config.environment.sandbox
    expected = '"off" in a sandbox, whose tools could leave false results to every other episode'
    yield cache == "off" or sandbox == "none", "environment.tool_cache", expected, f'"{cache}"'
    yield from demands_of_curriculum(
        config.curriculum,
        environment=config.environment,
        agent=config.agent,
        sampling=config.sampling,
        batch=config.batch,
        objective=config.objective,
    )


def _demands_of_batches(config: RunConfig) -> Iterator[Demand]:
    """Yield what groups, batches and episodes demand of each other."""
    batch, parts, most = config.batch, config.optim.minibatches, config.environment.max_tokens
    size, turn, longest = batch.group_size, config.sampling.max_tokens, config.environment.timeout_s
    expected = "at least 2 (a lone attempt has no baseline)"
    yield size >= 2, "batch.group_size", expected, size
    expected = f"a divisor of batch.groups = {batch.groups}"
    yield batch.groups % parts == 0, "optim.minibatches", expected, parts
    expected = f"enough for all actors together to hold a group of batch.group_size = {size}"
    live = config.actor.count * config.actor.concurrency
    yield live >= size, "actor.concurrency", expected, config.actor.concurrency
    expected = f"below environment.max_tokens = {most}"
    yield turn < most, "sampling.max_tokens", expected, turn
    expected = f"at least environment.max_tokens = {most}, the longest trajectory"
    yield batch.token_budget >= most, "batch.token_budget", expected, batch.token_budget
    # A lease given again while its first episode still runs would be two episodes with one identity.
    lease, expected = config.hub.lease_timeout_s, f"more than environment.timeout_s = {longest:g}"
    yield lease > longest, "hub.lease_timeout_s", expected, lease


def _demands_of_the_policy(config: RunConfig) -> Iterator[Demand]:
    """Yield what warm start, model, optimizer and device demand."""
    warmup, model, betas = config.warmup, config.model, config.optim.betas
    low, high, aim = warmup.min_success, warmup.max_success, warmup.target_success
    expected = f"between warmup.min_success = {low} and warmup.max_success = {high}"
    yield low <= aim <= high, "warmup.target_success", expected, aim
    turn, most = config.sampling.max_tokens, config.environment.max_tokens
    length = changed(config.environment, warmup.environment, "warmup.environment").max_tokens
    expected = f"above sampling.max_tokens = {turn} and at most environment.max_tokens = {most}"
    yield turn < length <= most, "warmup.environment.max_tokens", expected, length
    expected = f"a multiple of 2 x model.heads = {2 * model.heads}"
    yield model.hidden_size % (2 * model.heads) == 0, "model.hidden_size", expected, model.hidden_size
    expected = "two numbers in [0, 1)"
    yield all(0.0 <= beta < 1.0 for beta in betas), "optim.betas", expected, list(betas)
    expected = "hermes, the only one that the small policy learns, unless model.path is set"
    calls = model.call_format
    yield calls == "hermes" or bool(model.path), "model.call_format", expected, calls
    device = re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device)
    yield device is not None, "device", '"auto", "cpu", "cuda" or "cuda:N"', f'"{config.device}"'


def _demands_of_addresses(config: RunConfig) -> Iterator[Demand]:
    """Yield what must stay on this machine unless somebody said otherwise."""
    hub, inference = config.hub, config.inference
    expected = (
        "on this machine (tcp://127.0.0.1:PORT, ipc://PATH), unless hub.keys names a folder that `slipstream "
        "keys` made, or hub.insecure = true lets anyone in"
    )
    inside = stays_on_machine(hub.address) or bool(hub.keys) or hub.insecure
    yield inside, "hub.address", expected, hub.address
    yield not (hub.insecure and hub.keys), "hub.insecure", "false where hub.keys is set", True
    beyond, host = not stays_on_machine(f"tcp://{inference.host}:0"), f'"{inference.host}"'
    expected = (
        "on this machine, unless inference.insecure = true says that requests and their key may go "
        "unencrypted through a network of your own"
    )
    yield not beyond or inference.insecure, "inference.host", expected, host
    expected = "an address of this machine that actors reach"
    yield inference.host not in {"", "0.0.0.0", "::"}, "inference.host", expected, host


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of a recipe with "a.b=value" overrides applied in order.

    `recipe` is a shipped name or the path of a TOML file. Values are TOML; what is not TOML is
    taken as a string.

    Raises: ConfigurationError naming the source, the key, what was expected and what was given.
    Example: ``load_config("research", ["optim.learning_rate=3e-4", "seed=2"])``.
    """
    label, text = _recipe_text(recipe)
    try:
        return _loaded(label, text, overrides)
    except RecursionError:
        raise ConfigurationError(f"{label}: expected keys and values, got some nested too deep") from None


def configured(overrides: Sequence[str]) -> RunConfig:
    """Return the defaults with "a.b=value" overrides applied; raises as `load_config` does."""
    return _loaded("defaults", "", overrides)


def _loaded(label: str, text: str, overrides: Sequence[str]) -> RunConfig:
    try:
        data = tomllib.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"{label}: not valid TOML: {error}") from None
    _check_keys(data, label)
    given: set[str] = set()
    for override in overrides:
        tree = _parse_override(override)
        _check_keys(tree, "command line")
        _merge(data, tree)
        given.update(_leaves(tree))
    return _validated(data, label, given)


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def dump(config: RunConfig) -> str:
    """Return the whole configuration as TOML that `load_config` reads back unchanged."""
    return tomli_w.dumps(config.model_dump(mode="json"))


def save(config: RunConfig, path: Path) -> None:
    """Write the configuration to `path` atomically: temporary file, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(dump(config))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read(path: Path) -> RunConfig:
    """Return the configuration that `save` wrote."""
    return load_config(path)


def _recipe_text(recipe: str | Path) -> tuple[str, str]:
    """Return how messages name a recipe, and its text."""
    if isinstance(recipe, str) and recipe in shipped_recipes():
        recipe = RECIPES / f"{recipe}.toml"
    path = Path(recipe)
    if isinstance(recipe, str) and path.suffix != ".toml" and "/" not in recipe:
        shipped = shipped_recipes()
        raise ConfigurationError(
            f'unknown recipe "{recipe}"{hint(recipe, shipped)}; shipped are {", ".join(shipped)}; '
            "a recipe of your own is given as the path of a .toml file"
        )
    try:
        return path.name, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigurationError(f"recipe {path} cannot be read: {reason}") from None


def _parse_override(override: str) -> dict[str, Any]:
    """Return {"a": {"b": value}} for "a.b=value"."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigurationError(f'command line: expected key=value, got "{override}"')
    value: Any = text
    with contextlib.suppress(tomllib.TOMLDecodeError):
        value = tomllib.loads(f"value = {text}")["value"]
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    tree: dict[str, Any] = value
    return tree


def _merge(data: dict[str, Any], tree: Mapping[str, Any]) -> None:
    """Lay `tree` over `data` in place; a value that is not a table is replaced."""
    for key, value in tree.items():
        old = data.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            _merge(old, value)
        else:
            data[key] = value


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all values of nested tables."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _check_keys(tree: Mapping[str, Any], source: str) -> None:
    """Refuse keys that do not exist, naming the nearest one that does."""
    valid = list(_leaves(RunConfig().model_dump()))
    sections = {key.split(".")[0] for key in valid if "." in key}
    for key in _leaves(tree):
        if key in RENAMED:
            raise ConfigurationError(f"{source}: {key} is now called {RENAMED[key]}")
        if key not in valid and key not in sections and not f"{key}.".startswith(FREE_TABLES):
            raise ConfigurationError(f"{source}: unknown key {key}{hint(key, valid)}")


def _validated(data: Mapping[str, Any], label: str, given: set[str]) -> RunConfig:
    """Build the models; a message names where the faulty value came from."""
    try:
        # JSON mode: strict about types, yet an array is a tuple.
        return RunConfig.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise ConfigurationError(sentence(error.errors()[0], label, given)) from None
    except ConfigurationError as error:
        source = "command line" if any(key in str(error) for key in given) else label
        raise ConfigurationError(f"{source}: {error}") from None
