"""Scripted players: the expert always succeeds, the others as often as probability says."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from slipstream.chat import Chat
from slipstream.config import RunConfig, load_config
from slipstream.demonstrations import FIRST_DEMONSTRATION, demonstrations, play
from slipstream.environments import environment_factory
from slipstream.environments.factory import ORACLE
from slipstream.episodes import EpisodeRunner
from slipstream.types import Outcome, Split, ToolStatus, Trajectory

TASKS = 250
HASTY = "the careless one"
ROOMY = ["environment.max_turns=60", "environment.max_tokens=1024"]


def runner_of(config: RunConfig, chat: Chat) -> EpisodeRunner:
    return EpisodeRunner(
        factory=environment_factory(config.environment, config.rewards),
        chat=chat,
        environment=config.environment,
        rewards=config.rewards,
    )


def played(config: RunConfig, chat: Chat, who: str, tasks: int = TASKS) -> list[Trajectory]:
    runner = runner_of(config, chat)
    script = runner.factory.scripts[who] if who != HASTY else runner.factory.careless
    assert script is not None

    async def work() -> list[Trajectory]:
        return [await play(runner, config, Split.HELDOUT, index, script) for index in range(tasks)]

    return asyncio.run(work())


def success(config: RunConfig, chat: Chat, who: str) -> float:
    return float(np.mean([t.success for t in played(config, chat, who)]))


@pytest.mark.parametrize("hops", [1, 2])
def test_the_expert_always_succeeds_when_tools_do(chat: Chat, hops: int) -> None:
    config = load_config(
        "research", [*ROOMY, "environment.tool_failure_rate=0.0", f"environment.options.hops={hops}"]
    )
    for trajectory in played(config, chat, ORACLE, 100):
        assert trajectory.success
        assert trajectory.outcome is Outcome.COMPLETED
        # Per hop a search and one to three documents, then the answer.
        assert 2 * hops + 1 <= len(trajectory.turn_rewards) <= 4 * hops + 1


def test_the_expert_retries_until_tools_work(chat: Chat) -> None:
    config = load_config("research", [*ROOMY, "environment.tool_failure_rate=0.3"])
    assert success(config, chat, ORACLE) == 1.0


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_without_retry_success_is_that_of_no_error(chat: Chat, rate: float) -> None:
    """The true document is the k-th of three with equal chance: mean over k of (1 - p)^(1 + k)."""
    config = load_config("research", [*ROOMY, f"environment.tool_failure_rate={rate}"])
    expected = np.mean([(1 - rate) ** (1 + k) for k in (1, 2, 3)])
    error = (expected * (1 - expected) / TASKS) ** 0.5
    assert success(config, chat, "without_retry") == pytest.approx(expected, abs=3.5 * error)


def test_the_hasty_believe_the_first_document(chat: Chat) -> None:
    config = load_config("research", [*ROOMY, "environment.tool_failure_rate=0.1"])
    expected = 0.9**2 / 3
    error = (expected * (1 - expected) / TASKS) ** 0.5
    assert success(config, chat, HASTY) == pytest.approx(expected, abs=3.5 * error)


@pytest.mark.parametrize("retrying", [0.0, 0.5, 0.9])
def test_the_careless_can_be_careful_at_some_decisions(chat: Chat, retrying: float) -> None:
    """A call that fails with p and is repeated with q comes through with c = (1 - p) / (1 - p q)."""
    rate = 0.3
    options = f"environment.options={{reading_on=1.0, retrying={retrying}}}"
    config = load_config("research", [*ROOMY, f"environment.tool_failure_rate={rate}", options])
    passes = (1 - rate) / (1 - rate * retrying)
    expected = np.mean([passes ** (1 + k) for k in (1, 2, 3)])
    error = (expected * (1 - expected) / TASKS) ** 0.5
    assert success(config, chat, HASTY) == pytest.approx(expected, abs=3.5 * error)
    first, again = (played(config, chat, HASTY, 20) for _ in range(2))
    assert [t.token_ids.tolist() for t in first] == [t.token_ids.tolist() for t in again]


def test_doing_nothing_fails(chat: Chat) -> None:
    config = load_config("research")
    shown = played(config, chat, "do_nothing", 20)
    assert not any(t.success for t in shown)
    assert {len(t.turn_rewards) for t in shown} == {1}


def test_demonstrations_repeat_and_mix_habits(chat: Chat) -> None:
    config = load_config("research", ["warmup.careful_share=0.3"])
    runner = runner_of(config, chat)
    shown = asyncio.run(demonstrations(runner, config, range(300), chat))
    again = asyncio.run(demonstrations(runner, config, [7, 250], chat))
    for number, one in zip((7, 250), again, strict=True):
        np.testing.assert_array_equal(one.token_ids, shown[number].token_ids)
    assert {t.attempt.task for t in shown} == set(range(FIRST_DEMONSTRATION, FIRST_DEMONSTRATION + 300))
    # 0.3 careful at nearly 1.0, 0.7 hasty at 0.27.
    assert np.mean([t.success for t in shown]) == pytest.approx(0.3 + 0.7 * 0.27, abs=0.1)


def test_what_the_careful_turn_to_after_an_error_can_be_left_out(chat: Chat) -> None:
    """One name in each message behind an error, and nothing else; the careless show what they do."""
    settings = [*ROOMY, "environment.tool_failure_rate=0.4", "warmup.careful_share=0.5"]
    config = load_config("research", settings)
    runner = runner_of(config, chat)
    whole = asyncio.run(demonstrations(runner, config, range(40), chat))
    hidden = load_config("research", [*settings, "warmup.careful_recovery=false"])
    left = asyncio.run(demonstrations(runner, hidden, range(40), chat))
    names = 0
    for shown, cut in zip(whole, left, strict=True):
        np.testing.assert_array_equal(shown.token_ids, cut.token_ids)
        out = np.flatnonzero(shown.loss_mask != cut.loss_mask)
        assert not cut.loss_mask[out].any()
        failed = [call.turn for call in shown.tool_calls if call.status is ToolStatus.ERROR]
        tried_again = [call.name for call in shown.tool_calls if call.turn - 1 in failed]
        if "answer" in tried_again:  # a careless one gave up
            assert not out.size
        else:
            assert sorted(set(shown.turns[out].tolist())) == [turn + 1 for turn in failed]
            said = [chat.decode(shown.token_ids[out][shown.turns[out] == turn + 1]) for turn in failed]
            assert all(name in text for name, text in zip(tried_again, said, strict=True))
            assert all('"}}' not in text for text in said), "what is asked for is still learnt"
            names += len(tried_again)
    assert names > 20


def test_scripted_tokens_claim_no_version(chat: Chat) -> None:
    (one,) = played(load_config("research"), chat, ORACLE, 1)
    assert set(one.versions.tolist()) == {-1}
    assert one.loss_mask.sum() > 0 and not one.behavior_logprobs.any()
