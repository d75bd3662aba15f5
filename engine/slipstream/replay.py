"""Floor 5. A recorded episode once more: the same messages against environment, tool cache and seeds.

What the policy said is taken from the record, token by token; all the rest is made anew and compared: the
prompt, each turn's call, observation and reward, the outcome, the scores. Latencies and what came out of
a cache may differ. An episode that its time or its infrastructure ended is compared up to there.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slipstream import recorded as at_rest
from slipstream import versions
from slipstream.call_formats import CALL_FORMATS
from slipstream.chat import Chat
from slipstream.config import RunConfig
from slipstream.episodes import EpisodeRunner
from slipstream.errors import RunFolderError
from slipstream.redaction import Redactor
from slipstream.run_folder import read_config
from slipstream.runners import configured_runner, stage_of
from slipstream.tokenizer import load_tokenizer
from slipstream.types import Completion, Int32Array, Lease, Outcome, Trajectory

CUT_SHORT = frozenset({Outcome.TIMED_OUT, Outcome.INFRASTRUCTURE_FAILURE})
"""Outcomes that nothing the policy said has brought about."""
_SHOWN = 200
"""Most characters of a value that is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A place where the replay is not as the record."""

    where: str
    """"turn 2", counted from 0, or "episode"."""
    field: str
    recorded: Any
    got: Any

    def __str__(self) -> str:
        return f"{self.where}, {self.field}: recorded {_told(self.recorded)}, got {_told(self.got)}"


def main(folder: Path, wanted: str, *, failed: bool) -> int:
    """Replay the episode that `wanted` names, else the newest, and print what differs; 0 if nothing does.

    Raises RunFolderError when there is no such episode or it cannot be replayed.
    """
    config = read_config(folder)
    if config.agent.program:
        raise RunFolderError(
            f"{folder} trains an agent program ({config.agent.program}): its own code decides what is said "
            "and done, and is not recorded; its episodes cannot be replayed"
        )
    recorded = at_rest.find(folder, wanted) if wanted else at_rest.newest(folder, failed=failed)
    if recorded.segments:
        raise RunFolderError(f"{folder}: an episode of several segments is an agent's: it cannot be replayed")
    chat = _chat(config, folder)
    redactor = Redactor.of_process(config.environment.canaries)
    runner = stage_of(configured_runner(config, chat, redactor, folder=folder), recorded.stage)
    assert isinstance(runner, EpisodeRunner)
    sys.stdout.write(f"{_headline(recorded)}\n")
    for difference in _other_versions(folder, runner):
        sys.stdout.write(f"note: {difference}\n")
    found = asyncio.run(differences(runner, recorded))
    for different in found:
        sys.stdout.write(f"{different}\n")
    sys.stdout.write(f"differs in {len(found)} places\n" if found else f"replayed: {_compared(recorded)}\n")
    return 1 if found else 0


async def differences(runner: EpisodeRunner, recorded: Trajectory) -> list[Difference]:
    """Play the recorded messages again and return where the episode differs; closes the runner."""
    try:
        return (await played_again(runner, recorded))[1]
    finally:
        await runner.close()


async def played_again(runner: EpisodeRunner, recorded: Trajectory) -> tuple[Trajectory, list[Difference]]:
    """Return the episode that the recorded messages make now, and where it differs."""
    speaker = _Recorded(recorded, runner.chat.stop_token)
    lease = Lease(
        attempt=recorded.attempt,
        split=recorded.split,
        evaluation=recorded.evaluation,
        issue=recorded.issue,
        stage=recorded.stage,
    )
    got = await runner.run(lease, speaker, recorded.sampling)
    assert isinstance(runner.chat, Chat)  # whose words the differences are told in
    return got, list(_compare(recorded, got, runner.chat, goes_on=speaker.ran_out))


class _Recorded:
    """Speaks in the policy's place: each recorded message in turn."""

    def __init__(self, recorded: Trajectory, stop_token: int) -> None:
        self._recorded, self._stop_token = recorded, stop_token
        self._turn = 0
        self.ran_out = False
        """Whether a message was asked for that was never said."""

    async def __call__(self, tokens: Int32Array, observation: str) -> Completion:
        said = self._recorded.turns == self._turn
        self._turn += 1
        if not said.any():
            self.ran_out = True
            raise TimeoutError  # ends the episode as its time would
        token_ids = self._recorded.token_ids[said]
        return Completion(
            token_ids=token_ids,
            logprobs=self._recorded.behavior_logprobs[said],
            versions=self._recorded.versions[said],
            stopped=int(token_ids[-1]) == self._stop_token,
        )


def _compare(recorded: Trajectory, got: Trajectory, chat: Chat, *, goes_on: bool) -> Iterator[Difference]:
    turns, whole = len(recorded.turn_rewards), recorded.outcome not in CUT_SHORT
    # The last message of an episode cut short may never have been answered.
    answered = turns if whole or _shown(recorded, turns - 1).size else turns - 1
    yield from _differ("episode", "prompt", *(chat.decode(_shown(one, -1)) for one in (recorded, got)))
    for turn in range(answered):
        where = f"turn {turn}"
        if turn >= len(got.turn_rewards):
            yield Difference(
                where=where, field="end", recorded="goes on", got=f"{got.outcome} {got.note}".strip()
            )
            return
        yield from _differ(where, "call", _call(recorded, turn), _call(got, turn))
        yield from _differ(where, "observation", *(chat.decode(_shown(one, turn)) for one in (recorded, got)))
        yield from _differ(where, "reward", *(float(one.turn_rewards[turn]) for one in (recorded, got)))
    if whole:
        ended = "goes on" if goes_on else str(got.outcome)
        yield from _differ("episode", "outcome", str(recorded.outcome), ended)
    if answered == turns and recorded.outcome is not Outcome.INFRASTRUCTURE_FAILURE:
        yield from _differ("episode", "scores", _scores(recorded), _scores(got))


def _differ(where: str, field: str, recorded: Any, got: Any) -> Iterator[Difference]:
    if recorded != got:
        yield Difference(where=where, field=field, recorded=recorded, got=got)


def _shown(trajectory: Trajectory, turn: int) -> Int32Array:
    """Return the tokens between the policy's message of a turn (-1: the beginning) and its next one."""
    # -1 is also what `turns` says of tokens that the policy did not sample.
    said = np.flatnonzero(trajectory.turns == turn) if turn >= 0 else np.zeros(0, np.int64)
    start = int(said[-1]) + 1 if said.size else 0
    later = np.flatnonzero(trajectory.loss_mask[start:])
    end = start + int(later[0]) if later.size else len(trajectory.token_ids)
    return trajectory.token_ids[start:end]


def _call(trajectory: Trajectory, turn: int) -> dict[str, Any] | None:
    for call in trajectory.tool_calls:
        if call.turn == turn:
            return {"name": call.name, "arguments": dict(call.arguments), "status": str(call.status)}
    return None


def _scores(trajectory: Trajectory) -> dict[str, float | str | None]:
    return {score.name: score.invalid or score.value for score in trajectory.scores}


def _chat(config: RunConfig, folder: Path) -> Chat:
    tokenizer = load_tokenizer(folder / "checkpoints" / "warmup")
    calls = CALL_FORMATS[config.model.call_format]
    return Chat(tokenizer, explain_calls=bool(config.model.path), calls=calls)


def _other_versions(folder: Path, runner: EpisodeRunner) -> Sequence[str]:
    recorded = versions.recorded_in(folder)
    return versions.differences(recorded, versions.present(runner.factory.versions)) if recorded else ()


def _headline(recorded: Trajectory) -> str:
    identity, attempt = recorded.identity, recorded.attempt
    result = "success" if recorded.success else "no success"
    return (
        f"{identity.actor}/{identity.epoch}/{identity.seq}: {recorded.split} task {attempt.task}, group "
        f"{attempt.group}, attempt {attempt.attempt}: {recorded.outcome}, {result}"
        + (f" ({recorded.note})" if recorded.note else "")
    )


def _compared(recorded: Trajectory) -> str:
    turns, calls = len(recorded.turn_rewards), len(recorded.tool_calls)
    until = " up to where it was cut short" if recorded.outcome in CUT_SHORT else ""
    return f"equal{until}, {turns} turns, {calls} tool calls"


def _told(value: Any) -> str:
    spelled = json.dumps(value, ensure_ascii=False)
    return spelled if len(spelled) <= _SHOWN else f"{spelled[:_SHOWN]}…"
