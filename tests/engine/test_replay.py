"""Replay: an episode played again is equal, whatever happened in it, and what was changed is named."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from slipstream import cli, recorded, run_folder, versions
from slipstream.chat import Chat
from slipstream.config import RunConfig, load_config
from slipstream.episodes import EpisodeRunner
from slipstream.events import Received
from slipstream.ingest import IngestLog
from slipstream.redaction import Redactor
from slipstream.runners import configured_runner, stage_of
from slipstream.spool import Spool
from slipstream.tools.hermes import format_call
from slipstream.types import (
    Completion,
    Int32Array,
    Lease,
    Outcome,
    Sampling,
    Split,
    TaskAttempt,
    ToolStatus,
    Trajectory,
    TrajectoryId,
)
from slipstream.wire import encode_trajectory

SEARCH, OPEN = format_call("search", {"query": "home"}), format_call("open", {"document": "17"})
ANSWER = format_call("answer", {"text": "Oslo"})
MANY_FAULTS = "environment.tool_failure_rate=0.5"


class Folder:
    """A run folder with episodes in it, and the command on it."""

    def __init__(self, path: Path, chat: Chat, capsys: pytest.CaptureFixture[str], *settings: str) -> None:
        self.path, self._chat, self._capsys = path, chat, capsys
        self.config: RunConfig = load_config("research", settings)
        run_folder.write_config(path, self.config)
        (path / "checkpoints" / "warmup").mkdir(parents=True)
        chat.tokenizer.save_pretrained(path / "checkpoints" / "warmup")
        self.made: list[Trajectory] = []

    def play(self, texts: Sequence[str], *, cut: int | None = None, stage: int = -1) -> Trajectory:
        """Play an episode of these messages; when they run out nothing is said until the time is over."""
        runner = stage_of(configured_runner(self.config, self._chat, Redactor(), folder=self.path), stage)
        assert isinstance(runner, EpisodeRunner)
        left = list(texts)

        async def speak(tokens: Int32Array, observation: str) -> Completion:
            if not left:
                raise TimeoutError
            said = self._chat.message(left.pop(0))
            said = said if cut is None else said[:cut]
            count = len(said)
            logprobs = -0.1 * np.arange(1, count + 1, dtype=np.float32)
            return Completion(
                token_ids=said, logprobs=logprobs, versions=np.zeros(count, np.int32), stopped=cut is None
            )

        number = len(self.made)
        attempt = TaskAttempt(task=5, seed=1, group=5, attempt=number)
        lease = Lease(attempt=attempt, split=Split.TRAIN, stage=stage)

        async def whole() -> Trajectory:
            try:
                return await runner.run(lease, speak, Sampling())
            finally:
                await runner.close()

        made = dataclasses.replace(
            asyncio.run(whole()), identity=TrajectoryId(run="r", actor="actor-0", epoch=0, seq=number)
        )
        self.made.append(made)
        return made

    def keep(self, *trajectories: Trajectory) -> None:
        """Write episodes into the log, in order."""
        log = IngestLog(self.path / "trajectories")
        for one in trajectories:
            log.append(received(one), encode_trajectory(one))
        log.close()

    def replay(self, *arguments: str) -> tuple[int, str, str]:
        """Run the command; return its exit code and what it wrote."""
        code = cli.main(["replay", str(self.path), *(arguments or ["--last"])])
        return code, *self._capsys.readouterr()


def received(one: Trajectory) -> Received:
    return Received(
        identity=one.identity, attempt=one.attempt, split=one.split, evaluation=-1, issue=0,
        outcome=one.outcome, success=one.success, reward=0.0, turns=1, tokens=1, serials=(0,),
        verdict="buffered",
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, chat: Chat, capsys: pytest.CaptureFixture[str]) -> Callable[..., Folder]:
    return lambda *settings: Folder(tmp_path / "run", chat, capsys, *settings)


@pytest.mark.parametrize(
    ("texts", "settings", "outcome"),
    [
        ([SEARCH, OPEN, OPEN, SEARCH, ANSWER], [MANY_FAULTS], Outcome.COMPLETED),
        ([SEARCH, "I wonder", "{", "<tool_call>", "?"], [MANY_FAULTS], Outcome.INVALID_ACTION),
        ([SEARCH] * 9, ["environment.max_turns=4"], Outcome.TRUNCATED),
        ([SEARCH] * 9, ["environment.max_tokens=96"], Outcome.TRUNCATED),
        ([SEARCH, OPEN], [MANY_FAULTS, "environment.tool_cache=run"], Outcome.TIMED_OUT),
    ],
    ids=["completed", "invalid", "turns", "tokens", "timed out"],
)
def test_any_episode_is_equal_when_it_is_played_again(
    folder: Callable[..., Folder], texts: list[str], settings: list[str], outcome: Outcome
) -> None:
    run = folder(*settings)
    made = [run.play(texts) for _ in range(3)]
    assert {one.outcome for one in made} == {outcome}
    if MANY_FAULTS in settings:
        calls = [[call.status for call in one.tool_calls] for one in made]
        assert any(ToolStatus.ERROR in statuses for statuses in calls) and len({*map(tuple, calls)}) > 1
    run.keep(*made)
    for number in range(3):
        code, out, err = run.replay(f"actor-0/0/{number}")
        assert (code, err) == (0, "")
        assert f"actor-0/0/{number}: train task 5, group 5, attempt {number}: {outcome}, no success" in out
        turns, calls = len(made[number].turn_rewards), len(made[number].tool_calls)
        until = " up to where it was cut short" if outcome is Outcome.TIMED_OUT else ""
        assert out.endswith(f"replayed: equal{until}, {turns} turns, {calls} tool calls\n")


def test_a_stage_of_a_curriculum_is_played_in_its_own_environment(folder: Callable[..., Folder]) -> None:
    """Where a tool is missing, calls of it are other than in the real task."""
    stage = "curriculum.stages=[{tools=['open', 'answer']}]"
    run = folder("curriculum.enabled=true", stage, "environment.tool_failure_rate=0.0")
    made = run.play([SEARCH, ANSWER], stage=0)
    assert [call.name for call in made.tool_calls] == ["answer"]
    run.keep(made)
    code, told, _ = run.replay()
    assert (code, told.splitlines()[-1].partition(":")[0]) == (0, "replayed")


def test_a_message_that_was_cut_is_cut_again(folder: Callable[..., Folder]) -> None:
    run = folder()
    run.keep(run.play([SEARCH, OPEN, ANSWER], cut=3))
    assert run.replay()[0] == 0


@pytest.mark.parametrize("backend", ["process"])
def test_in_the_sandbox_too(folder: Callable[..., Folder], backend: str) -> None:
    run = folder(MANY_FAULTS, f"environment.sandbox={backend}")
    run.keep(run.play([SEARCH, OPEN, OPEN, ANSWER]))
    assert run.replay()[0] == 0


def changed(made: Trajectory, what: str, chat: Chat) -> tuple[Trajectory, str]:
    """Return the episode as it might have been in another world, and how that is told."""
    calls = list(made.tool_calls)
    match what:
        case "call":
            calls[1] = dataclasses.replace(calls[1], status=ToolStatus.ERROR)
            told = (
                'turn 1, call: recorded {"name": "open", "arguments": {"document": "17"}, "status": "error"}'
            )
            return dataclasses.replace(made, tool_calls=calls), told
        case "observation":
            place = int(np.flatnonzero(made.turns == 0)[-1]) + 2
            tokens = made.token_ids.copy()
            tokens[place] = chat.encode("17")[0]
            assert tokens[place] != made.token_ids[place]
            return dataclasses.replace(made, token_ids=tokens), 'turn 0, observation: recorded "<|tool|>17'
        case "prompt":
            tokens = made.token_ids.copy()
            tokens[1] = chat.stop_token
            return dataclasses.replace(made, token_ids=tokens), 'episode, prompt: recorded "<|system|><|end|>'
        case "reward":
            rewards = made.turn_rewards.copy()
            rewards[0] = 0.5
            return dataclasses.replace(made, turn_rewards=rewards), "turn 0, reward: recorded 0.5, got -0.05"
        case "outcome":
            told = 'episode, outcome: recorded "truncated", got "completed"'
            return dataclasses.replace(made, outcome=Outcome.TRUNCATED), told
        case _:
            scores = [dataclasses.replace(made.scores[0], value=1.0), *made.scores[1:]]
            return dataclasses.replace(made, scores=scores), 'episode, scores: recorded {"outcome": 1.0'


@pytest.mark.parametrize("what", ["call", "observation", "prompt", "reward", "outcome", "scores"])
def test_what_differs_is_named(folder: Callable[..., Folder], chat: Chat, what: str) -> None:
    run = folder("environment.tool_failure_rate=0.0")
    other, told = changed(run.play([SEARCH, OPEN, ANSWER]), what, chat)
    run.keep(other)
    code, out, _ = run.replay()
    assert code == 1 and told in out and ", got " in out, out
    assert out.endswith("differs in 1 places\n")


def test_an_episode_that_ends_elsewhere(folder: Callable[..., Folder]) -> None:
    run = folder("environment.tool_failure_rate=0.0")
    made = run.play([SEARCH, ANSWER])
    longer = dataclasses.replace(made, turn_rewards=np.append(made.turn_rewards, np.float32(0.0)))
    run.keep(longer)
    code, out, _ = run.replay()
    assert code == 1 and 'turn 2, end: recorded "goes on", got "completed"' in out
    run.keep(dataclasses.replace(run.play([SEARCH]), outcome=Outcome.COMPLETED))
    code, out, _ = run.replay()
    assert code == 1 and 'episode, outcome: recorded "completed", got "goes on"' in out


def test_a_failed_ground_is_compared_up_to_there(folder: Callable[..., Folder]) -> None:
    run = folder()
    made = run.play([SEARCH])
    run.keep(dataclasses.replace(made, outcome=Outcome.INFRASTRUCTURE_FAILURE, scores=(), note="store gone"))
    code, out, _ = run.replay("--failed")
    assert code == 0 and "infrastructure_failure, no success (store gone)" in out
    assert "replayed: equal up to where it was cut short" in out


def test_other_versions_are_noted(folder: Callable[..., Folder]) -> None:
    run = folder()
    versions.hold(run.path, {**versions.present({}), "torch": "0.1"}, accept=False)
    run.keep(run.play([ANSWER]))
    assert f"note: torch is {versions.present({})['torch']} here and was 0.1\n" in run.replay()[1]


def test_which_episode(folder: Callable[..., Folder]) -> None:
    """By name, by place, the newest, the newest that failed; in the log, the spool and what was put aside."""
    run = folder()
    made = [run.play([ANSWER]) for _ in range(4)]
    won = dataclasses.replace(
        made[2], scores=[dataclasses.replace(made[2].scores[0], value=1.0), *made[2].scores[1:]]
    )
    run.keep(made[1], made[0], won)
    spool = Spool(run.path / "spool" / "actor-0")
    spool.append(spool.next_seq, encode_trajectory(made[0]))
    spool.append(spool.next_seq, encode_trajectory(made[3]))

    def found(*arguments: str) -> str:
        return run.replay(*arguments)[1].partition(":")[0]

    assert found("actor-0/0/1") == found("0") == "actor-0/0/1"
    assert found("2") == "actor-0/0/2"
    assert found("--last") == found("--failed") == found("3") == "actor-0/0/3"
    spool.acknowledge([0, 1])
    assert [one.name for one in recorded.stored(run.path)][:3] == [
        "actor-0/0/1",
        "actor-0/0/0",
        "actor-0/0/2",
    ]
    (run.path / "spool" / "actor-0.0").rename(run.path / "spool" / "actor-0.0.quarantined")
    assert {one.name for one in recorded.stored(run.path)} >= {f"actor-0/0/{n}" for n in range(3)}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["actor-0/0/7"], "there is no episode actor-0/0/7; it holds 1, from actor-0/0/0 to actor-0/0/0"),
        (["1"], "there is no episode 1; it holds 1"),
        ([""], "give one of TRAJECTORY, such as actor-0/0/17, --last and --failed"),
        (["0", "--last"], "give one of TRAJECTORY, such as actor-0/0/17, --last and --failed"),
    ],
)
def test_a_mistake_is_one_sentence(folder: Callable[..., Folder], arguments: list[str], told: str) -> None:
    run = folder()
    run.keep(run.play([ANSWER]))
    code, out, err = run.replay(*arguments)
    assert (code, out) == (2, "") and told in err and err.count("\n") == 1


def test_what_cannot_be_replayed_says_so(
    folder: Callable[..., Folder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder("agent.program=agent.py:run")
    code, _, err = run.replay()
    assert code == 2 and "trains an agent program (agent.py:run)" in err
    assert cli.main(["replay", str(tmp_path / "none"), "--last"]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_an_empty_run_has_nothing_to_replay(folder: Callable[..., Folder]) -> None:
    code, _, err = folder().replay("--failed")
    assert code == 2 and "there is no episode without success; it holds none" in err
