"""A curriculum's configuration: what a stage may change, and combinations that cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipstream.config import EnvironmentConfig, StageConfig, load_config, read, save
from slipstream.config_curriculum import staged
from slipstream.errors import ConfigurationError

REAL = EnvironmentConfig(options={"hops": 2, "documents_per_fact": 3}, max_turns=10)
ON = "curriculum.enabled=true"


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_config("research", [ON, *overrides])
    return str(caught.value)


def test_a_stage_changes_some_keys_and_keeps_the_others() -> None:
    stage = StageConfig(environment={"options": {"hops": 1}, "max_turns": 4, "tool_failure_rate": 0.0})
    easy = staged(REAL, stage, 0)
    assert easy.options == {"hops": 1, "documents_per_fact": 3}
    assert (easy.max_turns, easy.tool_failure_rate, easy.timeout_s) == (4, 0.0, REAL.timeout_s)
    assert (
        easy.model_copy(update={"options": REAL.options, "max_turns": 10, "tool_failure_rate": 0.1}) == REAL
    )
    assert staged(REAL, StageConfig(), 0) == REAL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("{max_turn=4}", r"warmup.environment: max_turn cannot .*; did you mean max_turns\?"),
        ("{max_tokens=9999}", r"warmup.environment.max_tokens must be above .* at most .* = 256, got 9999"),
        ("{options=3}", r"warmup.environment.options must be a table, got 3"),
    ],
)
def test_what_demonstrations_cannot_differ_in_is_refused(changes: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_config("research", [f"warmup.environment={changes}"])


def test_the_recipe_of_flaky_tools_goes_up_to_its_task_and_reads_back(tmp_path: Path) -> None:
    config = load_config("research-flaky")
    posed = [staged(config.environment, s, number) for number, s in enumerate(config.curriculum.stages)]
    climb = [(one.options["hops"], one.tool_failure_rate) for one in [*posed, config.environment]]
    assert climb == [(2, 0.3), (3, 0.45), (4, 0.5), (4, 0.6)]
    save(config, tmp_path / "config.toml")
    assert read(tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"max_turn": 4},
            r"curriculum.stages\[3\].environment: max_turn cannot .*; did you mean max_turns\?",
        ),
        (
            {"sandbox": "none"},
            "sandbox cannot be changed by a stage; a stage may change options, tool_failure",
        ),
        ({"options": 3}, r"curriculum.stages\[3\].environment.options must be a table, got 3"),
        (
            {"max_turns": 0},
            r"curriculum.stages\[3\].environment: max_turns must be greater than or equal to 1",
        ),
        ({"max_turns": "4"}, r"max_turns must be an integer, got \"4\""),
    ],
)
def test_what_no_stage_may_change_is_refused(environment: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        staged(REAL, StageConfig(environment=environment), 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["curriculum.band.low=0.95"],
            "curriculum.band.low must be below curriculum.band.high = 0.9, got 0.95",
        ),
        (["curriculum.stages=[{advance=0.05}]"], "stages[0].advance must be above curriculum.retreat = 0.05"),
        (["curriculum.stages=[{}, {advance=2}]"], "advance must be less than or equal to 1"),
        (["curriculum.stages=[{tool=1}]"], "tool must be "),
        (["curriculum.stages=[{environment={max_tokens=512}}]"], "at most 256, got 512"),
        (["curriculum.stages=[{environment={max_tokens=24}}]"], "above sampling.max_tokens = 24"),
        (
            ["curriculum.stages=[{}]", "agent.program=a:b"],
            "curriculum.stages must be empty where agent.program",
        ),
        (
            ["curriculum.exploration.alike_low=0.7"],
            "alike_low must be at most curriculum.exploration.alike_high",
        ),
        (
            ["curriculum.exploration.most_temperature=0.9"],
            "must be 0, or at least sampling.temperature = 1.0",
        ),
        (
            ["curriculum.exploration.most_temperature=1.2", "objective.kl_coefficient=0"],
            "must be 0 unless objective.kl_coefficient is positive",
        ),
        (
            ["curriculum.exploration.least_group_size=1"],
            "curriculum.exploration.least_group_size must be 0, or 2 to batch.group_size = 8, got 1",
        ),
        (["curriculum.exploration.least_group_size=9"], "or 2 to batch.group_size = 8, got 9"),
        # Two rewards lie further apart, in standard deviations, than eight can.
        (
            [
                "curriculum.exploration.least_group_size=2",
                "objective.advantage=std",
                "objective.std_floor=1.1",
            ],
            "objective.std_floor must be above 1.32, got 1.1",
        ),
        (["curriculum.dynamic.refills=0.01"], "curriculum.dynamic.refills must be enough for a group more"),
        (["curriculum.dynamic.refill=1"], "unknown key curriculum.dynamic.refill; did you mean"),
    ],
)
def test_combinations_that_cannot_work(overrides: list[str], message: str) -> None:
    assert message in refusal(*overrides)


def test_with_groups_of_eight_alone_that_floor_will_do() -> None:
    config = load_config("research", [ON, "objective.advantage=std", "objective.std_floor=1.1"])
    assert config.curriculum.exploration.least_group_size == 0


def test_a_curriculum_that_is_off_is_not_checked_and_its_stages_are_read_back(tmp_path: Path) -> None:
    stage = (
        "curriculum.stages=[{tools=['search'], lenient=0.5, environment={options={hops=1}}}, {advance=0.9}]"
    )
    assert not load_config("research", [stage, "curriculum.band.low=0.95"]).curriculum.enabled
    config = load_config("research", [stage, ON])
    save(config, tmp_path / "config.toml")
    assert read(tmp_path / "config.toml") == config
    assert config.curriculum.stages[0].tools == ("search",)
