"""Flaws planted one at a time: each is found, by the check that is for it, and by no other."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest

from slipstream.config import EnvironmentConfig, RunConfig, load_config
from slipstream.environment_audit.stage import Stage
from slipstream.environment_audit.verdicts import Level, Message, Verdict
from slipstream.environment_audit.worker import CHECKS, audit

sys.path.insert(0, str(Path(__file__).parent))
import planted

EPISODES = 6


def audited(config: RunConfig) -> dict[str, Verdict]:
    stage = Stage(config, episodes=EPISODES, seed=1)
    said: list[Message] = []

    async def run() -> None:
        assert await stage.look() == ""
        await audit(stage, said.append, time.monotonic() + 50.0)

    asyncio.run(run())
    stage.close()
    verdicts = {message.verdict.check: message.verdict for message in said if message.verdict}
    assert list(verdicts) == [name for name, _, _ in CHECKS]
    return verdicts


def failing(verdicts: dict[str, Verdict]) -> dict[str, str]:
    return {name: verdict.sentence for name, verdict in verdicts.items() if verdict.level is Level.FAIL}


def config_of(factory: planted.Factory, monkeypatch: pytest.MonkeyPatch, **environment: object) -> RunConfig:
    monkeypatch.setattr(planted, "chosen", factory, raising=False)
    given = {"name": "planted:chosen", "timeout_s": 0.4, **environment}
    return RunConfig(environment=EnvironmentConfig.model_validate(given))


@pytest.mark.parametrize("name", ["sound", "talks", "game"])
def test_nothing_is_said_against_a_sound_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = audited(config_of(getattr(planted, name), monkeypatch))
    assert {verdict.level for verdict in verdicts.values()} == {Level.PASS}, verdicts
    assert not any(verdict.early for verdict in verdicts.values())


@pytest.mark.parametrize(
    "flaw", [pytest.param(n, marks=pytest.mark.slow) if "blocks" in n else n for n in planted.FLAWS]
)
def test_a_flaw_is_found_by_its_check_alone(flaw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, factory, words = planted.FLAWS[flaw]
    found = failing(audited(config_of(factory, monkeypatch)))
    assert set(found) == set(check.split()), found
    assert words in found[check.split()[0]]


def test_tools_that_come_in_mid_run_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = audited(config_of(planted.new_tool, monkeypatch))
    assert verdicts["observations"].sentence.startswith("tools come or go in mid-run in ")
    assert {name for name, verdict in verdicts.items() if verdict.level is not Level.PASS} == {"observations"}


def test_without_an_oracle_the_rest_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = audited(config_of(planted.no_oracle, monkeypatch))
    assert verdicts["oracle"].level is Level.WARN
    assert not failing(verdicts)


def test_research_passes() -> None:
    verdicts = audited(load_config("research"))
    assert {verdict.level for verdict in verdicts.values()} == {Level.PASS}, verdicts
