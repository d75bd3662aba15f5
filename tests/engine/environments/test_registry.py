"""Environments by name: the shipped ones, one's own, and what is said of a wrong name or option."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipstream import cli, extras
from slipstream.config import EnvironmentConfig, RewardConfig, load_config
from slipstream.environments import SHIPPED, environment_factory
from slipstream.errors import ConfigurationError
from slipstream.types import Split

OWN = """
from slipstream.environments import EnvironmentFactory
from slipstream.environments.research import ResearchEnvironment, ResearchOptions, ResearchTasks

TASKS = ResearchTasks(ResearchOptions(hops=2))
NUMBER = 7

def made(config, rewards):
    return EnvironmentFactory(tasks=TASKS, make=lambda: ResearchEnvironment(TASKS, config, rewards))

ready = made(None, None)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "my_task.py"
    path.write_text(OWN)
    return path


def refusal(**given: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        environment_factory(EnvironmentConfig.model_validate(given), RewardConfig())
    return str(caught.value)


@pytest.mark.parametrize("attribute", ["made", "ready"])
def test_one_of_ones_own_is_a_function_or_a_factory(own: Path, attribute: str) -> None:
    factory = environment_factory(EnvironmentConfig(name=f"{own}:{attribute}"), RewardConfig())
    task = factory.tasks.task(Split.TRAIN, 3)
    assert task.question.startswith("Where does the manager of ")


@pytest.mark.parametrize(("name", "lacks"), [("bfcl", "bfcl_eval"), ("tau2", "tau2")])
def test_what_a_missing_package_takes_is_said(name: str, lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda package: None)
    assert refusal(name=name) == (
        f"environment {name} needs the extra {name}, and {lacks} is not installed; "
        f"run pip install 'slipstream[{name}]' && pip install --no-deps {extras.ALONE[name]}"
    )


def test_options_reach_the_environment() -> None:
    factory = environment_factory(EnvironmentConfig(options={"hops": 3}), RewardConfig())
    assert "the manager of the manager of" in factory.tasks.task(Split.TRAIN, 0).question


def test_what_is_wrong_is_said(own: Path) -> None:
    assert refusal(name="reserch") == (
        "environment.name: there is no environment reserch; did you mean research?; one of your own is given "
        "as module:attribute or path.py:attribute"
    )
    assert refusal(name="research:hard") == (
        "environment.name: research has no variants, got research:hard; give research"
    )
    assert f"expected nothing in {own}, found no such name" in refusal(name=f"{own}:nothing")
    assert f"expected {own}:NUMBER to be an EnvironmentFactory" in refusal(name=f"{own}:NUMBER")
    assert "cannot load missing.py" in refusal(name="missing.py:made")
    assert refusal(options={"hop": 2}) == (
        "environment.options: environment research has no option hop; did you mean hops?"
    )
    assert refusal(options={"hops": 9}) == (
        "environment.options: hops must be less than or equal to 8, got 9"
    )


def test_keys_that_moved_say_where_to() -> None:
    with pytest.raises(
        ConfigurationError, match=r"environment\.hops is now called environment\.options\.hops"
    ):
        load_config("research", ["environment.hops=2"])


def test_every_shipped_environment_says_what_it_is() -> None:
    assert all(shipped.about.endswith(".") for shipped in SHIPPED.values())


def test_the_list_says_what_each_is_and_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "list"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told if not line.startswith(" ")] == list(SHIPPED)
    assert "needs: pip install 'slipstream[bfcl]' && pip install --no-deps bfcl-eval==2026.3.23" in told[3]
    assert max(map(len, told)) <= 110
