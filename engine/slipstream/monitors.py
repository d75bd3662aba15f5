"""Floor 2. Signs that a policy has found something easier than the task.

repeated calls      it makes one call over and over, though it has been answered
no end              it goes on searching until the episode is cut
no call             what it says is no call any more: its language falls apart
one answer          whatever is asked, it answers alike
length              its messages grow far beyond what they were
verifier            its reward says success, and a verifier that it is never trained on says no
held out            it succeeds at tasks that it is trained on, and not at others: it has learnt them by heart

Each is a share or a ratio over a batch, told in every row of metrics; one above its limit is an alarm: a
sentence in the log and in the row. None of them touches a reward: they are signs, the tasks' own scores are
the judgement.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Final

from slipstream.config_parts import MonitorConfig
from slipstream.types import Outcome, ScoreKind, ToolCall, ToolStatus, Trajectory, succeeded

REPEATS: Final = 3
"""Equal calls in an episode, each answered without an error, that are no longer thoroughness."""
FIRST_STEPS: Final = 10
"""Steps whose mean length is the usual one."""
LAST_STEPS: Final = 10
"""Steps whose mean success is compared with that of an evaluation."""
_VERIFIER: Final = MonitorConfig().verifier
_CUT: Final = frozenset({Outcome.TRUNCATED, Outcome.TIMED_OUT})


def degeneracy(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return the metrics `monitor/*` of a batch that need no other batch.

    repeated_calls: share of episodes that make an equal call REPEATS times although it was answered;
    no_end: share of episodes that were cut while they called tools;
    no_call: share of episodes that ended because messages were no valid calls;
    one_answer: share of finished episodes whose last call is the commonest one, counted once for each group:
    attempts at one task may well agree. 0 with fewer than two groups.
    """
    count = max(1, len(trajectories))
    answers: dict[int, set[str]] = {}
    for trajectory in trajectories:
        if trajectory.outcome is Outcome.COMPLETED and trajectory.tool_calls:
            answers.setdefault(trajectory.attempt.group, set()).add(_spelled(trajectory.tool_calls[-1]))
    commonest = max(Counter(text for texts in answers.values() for text in texts).values(), default=0)
    return {
        "monitor/repeated_calls": sum(map(_repeats, trajectories)) / count,
        "monitor/no_end": sum(bool(t.outcome in _CUT and t.tool_calls) for t in trajectories) / count,
        "monitor/no_call": sum(t.outcome is Outcome.INVALID_ACTION for t in trajectories) / count,
        "monitor/one_answer": commonest / len(answers) if len(answers) > 1 else 0.0,
    }


def verifier_gap(trajectories: Sequence[Trajectory], verifier: str) -> tuple[float | None, list[float]]:
    """Return mean success minus the mean of the held-out verifier, and its values outside 0 to 1.

    Over the episodes whose outcomes were all judged and that have a metric called `verifier` from 0 to 1;
    None without any. The metric is no part of the reward, whatever it says.
    """
    gaps, strange = list[float](), list[float]()
    for trajectory in trajectories:
        found = [s.value for s in trajectory.scores if s.kind is ScoreKind.METRIC and s.name == verifier]
        outcomes = [score.value for score in trajectory.scores if score.kind is ScoreKind.OUTCOME]
        if not found or found[0] is None or not outcomes or None in outcomes:
            continue
        if 0.0 <= found[0] <= 1.0:
            gaps.append(succeeded(trajectory.scores) - found[0])
        else:
            strange.append(found[0])
    return (sum(gaps) / len(gaps) if gaps else None), strange


class Monitor:
    """Compares each batch with the limits, and its length with that of the first steps.

    Example: ``row |= monitor.observe(trajectories); for sentence in monitor.alarms: log.warning(sentence)``.
    """

    def __init__(self, config: MonitorConfig) -> None:
        self._config = config
        self._first: list[float] = []
        self._successes: deque[float] = deque(maxlen=LAST_STEPS)
        self.alarms: list[str] = []
        """Of the last batch, or evaluation."""

    def observe(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Return the metrics `monitor/*` of a batch, `monitor/alarms` among them."""
        length = sum(int(t.loss_mask.sum()) for t in trajectories) / max(1, len(trajectories))
        if len(self._first) < FIRST_STEPS:
            self._first.append(length)
        self._successes.append(sum(t.success for t in trajectories) / max(1, len(trajectories)))
        usual = sum(self._first) / len(self._first)
        found = degeneracy(trajectories)
        found["monitor/length_growth"] = length / usual if usual else 1.0
        verifier = self._config.verifier
        gap, strange = verifier_gap(trajectories, verifier) if verifier else (None, [])
        if gap is not None:
            found["monitor/verifier_gap"] = gap
        self.alarms = self._above(found)
        if verifier not in ("", _VERIFIER) and not any(
            s.name == verifier for t in trajectories for s in t.scores
        ):
            self.alarms.append(f"monitors.verifier: no episode has a metric {verifier}; nothing is compared")
        if strange:
            self.alarms.append(
                f"metric {verifier} gave {strange[0]:g}, expected 0 to 1: {len(strange)} of "
                f"{len(trajectories)} episodes are left out of verifier_gap; mend that metric"
            )
        return {**found, "monitor/alarms": float(len(self.alarms))}

    def compare(self, success: float) -> dict[str, float]:
        """Return the metric `monitor/heldout_gap` of an evaluation; {} before the first batch.

        It is the mean success of the last LAST_STEPS batches minus the evaluation's `success`.
        """
        if not self._successes:
            return {}
        found = {"monitor/heldout_gap": sum(self._successes) / len(self._successes) - success}
        self.alarms = self._above(found)
        return found

    def _above(self, found: Mapping[str, float]) -> list[str]:
        """Return a sentence for each metric that is above its limit."""
        limits = {key: getattr(self._config, key) for key in _MEANING}
        return [
            f"{key} is {found[f'monitor/{key}']:.2f}, above monitors.{key} = {limit:g}: {_MEANING[key]}"
            for key, limit in limits.items()
            if limit and found.get(f"monitor/{key}", 0.0) > limit
        ]

    def state(self) -> dict[str, list[float]]:
        """Return what a checkpoint keeps."""
        return {"lengths": list(self._first), "successes": list(self._successes)}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from what `state` returned; what is missing begins anew."""
        self._first = [float(length) for length in state.get("lengths", ())]
        self._successes.extend(state.get("successes", ()))


_READ: Final = "; read episodes before you trust the reward"
_MEANING: Final = {
    "repeated_calls": f"episodes make one call over and over{_READ}",
    "no_end": f"episodes call tools until they are cut{_READ}",
    "no_call": "messages are no valid calls; where they were at first, read kl/reference and masked/trust",
    "one_answer": f"different tasks get one answer{_READ}",
    "length_growth": f"messages are that many times as long as at first{_READ}",
    "verifier_gap": f"outcomes say success by so much more than the verifier that is not trained on{_READ}",
    "heldout_gap": "success is so much rarer at held-out tasks than in training, whose tasks are learnt by "
    "heart; pose more different ones",
}


def _repeats(trajectory: Trajectory) -> bool:
    answered = [_spelled(call) for call in trajectory.tool_calls if call.status is ToolStatus.OK]
    return max(Counter(answered).values(), default=0) >= REPEATS


def _spelled(call: ToolCall) -> str:
    return json.dumps([call.name, call.arguments], sort_keys=True, default=str)
