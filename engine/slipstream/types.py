"""Floor 0. The data that travels between roles: plain, frozen, without torch.

Dimensions: T tokens of one trajectory, U turns of one trajectory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Int16Array = NDArray[np.int16]
UInt8Array = NDArray[np.uint8]
Float32Array = NDArray[np.float32]


class Outcome(StrEnum):
    """How an episode ended. Only the first four carry a reward."""

    COMPLETED = "completed"
    TRUNCATED = "truncated"
    TIMED_OUT = "timed_out"
    INVALID_ACTION = "invalid_action"
    INFRASTRUCTURE_FAILURE = "infrastructure_failure"


class Split(StrEnum):
    """Which tasks an episode draws from; the three never share a task."""

    TRAIN = "train"
    HELDOUT = "heldout"
    FRESH = "fresh"


class ScoreKind(StrEnum):
    """What a score means for the reward: of the first three it is made, and outcomes dominate."""

    OUTCOME = "outcome"
    SHAPING = "shaping"
    PENALTY = "penalty"
    METRIC = "metric"
    """A number that is only shown."""
    MONITOR = "monitor"
    """Whether a monitor fired (1 or 0); `invalid` then says why."""
    HALT = "halt"
    """As before, of a monitor that wants the run to end."""


class ToolStatus(StrEnum):
    """How one tool call ended, as the policy sees it."""

    OK = "ok"
    ERROR = "error"
    INVALID = "invalid"
    CRASHED = "crashed"
    """The tool itself is at fault: it raised what it should not, or gave what cannot be shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One problem an environment can pose.

    Example: ``Task(split=Split.TRAIN, index=17, question="Where does Ada live?", data={"answer": "Oslo"})``.
    """

    split: Split
    index: int
    """Position in its split; a split and an index always give the same task."""
    question: str
    """What the policy is asked."""
    data: Mapping[str, Any]
    """What only the environment knows (the answer, the world); never shown to the policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskAttempt:
    """Identity of one attempt: all random numbers of an episode are keyed by it.

    Example: ``TaskAttempt(task=17, seed=1, group=17, attempt=3)``.
    """

    task: int
    seed: int
    group: int
    """Attempts of one group share a task and a baseline."""
    attempt: int
    """0 .. group size - 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The hub's permission to run one episode."""

    attempt: TaskAttempt
    split: Split
    evaluation: int = -1
    """Serial pinned for a held-out evaluation, or -1 for a training episode."""
    issue: int = 0
    """0 at first; counts up each time the same attempt is leased again."""
    stage: int = -1
    """The curriculum's stage, counted from 0, or -1 for the real task."""
    temperature: float | None = None
    """What the curriculum has a training episode sampled at; None: as configured."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class TrajectoryId:
    """Identity of a trajectory: unique for ever; an actor's restart takes a new epoch."""

    run: str
    actor: str
    epoch: int
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One named component of a trajectory's judgement."""

    name: str
    kind: ScoreKind
    weight: float
    """The component adds weight x value to the reward."""
    value: float | None
    """None when the component could not be scored; then `invalid` says why."""
    invalid: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """What happened to one tool call."""

    turn: int
    name: str
    arguments: Mapping[str, Any]
    status: ToolStatus
    latency_s: float
    cached: bool = False
    cut: bool = False
    """Whether the policy was shown less than it returned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What tokens are drawn from: softmax(logits / temperature), optionally cut to its nucleus."""

    temperature: float = 1.0
    """0 means greedy (evaluation only)."""
    top_p: float = 1.0
    """Below 1 in evaluation only: it would bias importance ratios by the kept mass."""
    max_tokens: int = 64
    """Most tokens of one assistant message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a backend sampled for one assistant message."""

    token_ids: Int32Array
    """[T] sampled tokens, the stop token included when it was sampled."""
    logprobs: Float32Array
    """[T] nats, of the tempered distribution each token was drawn from."""
    versions: Int32Array
    """[T] serial of the weights that sampled each token."""
    stopped: bool
    """True when the stop token was sampled, False when a length limit cut the message."""
    samplers: frozenset[tuple[str, int]] = frozenset()
    """(server, serial) of its tokens when servers sampled them; empty: the backend itself did."""


MARKED_MESSAGES: Final = 512
"""Of so many messages an episode notes when they were made: a header holds no more than 64 KiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where an episode's seconds went; wall-clock seconds of the actor's monotonic clock."""

    started_s: float = 0.0
    """Seconds since the epoch (for the slip in seconds only, never for order)."""
    finished_s: float = 0.0
    generate_s: float = 0.0
    tools_s: float = 0.0
    marks_ms: tuple[int, ...] = ()
    """Three for each message of the policy, the first MARKED_MESSAGES of them, in milliseconds after
    `started_s`: when it was asked for, when it was there, and when what it led to was there."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectory:
    """One finished episode, exactly as sampled: history is never tokenised again."""

    identity: TrajectoryId
    attempt: TaskAttempt
    split: Split
    evaluation: int
    """As in the lease."""
    issue: int
    """As in the lease."""
    token_ids: Int32Array
    """[T] prompt, sampled and observed tokens in order."""
    loss_mask: UInt8Array
    """[T] 1 where the policy sampled the token."""
    behavior_logprobs: Float32Array
    """[T] nats at sampling time; 0 where loss_mask is 0."""
    versions: Int32Array
    """[T] serial that sampled each token; -1 where loss_mask is 0."""
    turns: Int16Array
    """[T] assistant turn each sampled token belongs to; -1 where loss_mask is 0."""
    turn_rewards: Float32Array
    """[U] reward earned in each turn, penalties included, outcome in the last."""
    scores: Sequence[Score]
    outcome: Outcome
    tool_calls: Sequence[ToolCall]
    sampling: Sampling
    timings: Timings = field(default_factory=Timings)
    note: str = ""
    """The reason of an infrastructure failure or a time-out, in one line."""
    segments: tuple[int, ...] = ()
    """Where in [T] tokens begin that do not go on from those before them; the first segment begins at 0.

    An agent that cuts its history short, or asks beside it, is shown something else than it was: no token of
    a segment depends on one of another.
    """
    samplers: tuple[tuple[str, int], ...] = ()
    """(server, serial) of its sampled tokens, ascending; empty: the actor's own backend sampled all."""
    stage: int = -1
    """As in the lease."""

    @property
    def spans(self) -> list[slice]:
        """Where each segment lies in [T]."""
        edges = [0, *self.segments, len(self.token_ids)]
        return [slice(start, end) for start, end in pairwise(edges)]

    @property
    def success(self) -> bool:
        """True when every outcome score is positive."""
        return succeeded(self.scores)


def succeeded(scores: Sequence[Score]) -> bool:
    """Return whether there are outcome scores and all of them are positive."""
    outcomes = [score.value for score in scores if score.kind is ScoreKind.OUTCOME]
    return bool(outcomes) and all(value is not None and value > 0 for value in outcomes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """What a serial stands for. Serials are never reused, steps are repeated after a rollback."""

    serial: int
    incarnation: int
    """Counts the learner's starts in this run."""
    step: int
    """Optimizer steps that made these weights."""
    fork_step: int
    """Step of the checkpoint this incarnation started from."""
    checksum64: int
    """Checksum of all tensors in name order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """Announces published weights; the tensors themselves are in `folder`."""

    version: Version
    folder: str
    """Holds model.safetensors and manifest.json."""
    canary_tokens: tuple[int, ...]
    """A fixed token sequence every holder of the weights scores."""
    canary_logprobs: tuple[float, ...]
    """The learner's own log-probabilities of canary_tokens[1:]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightProof:
    """A backend's evidence that it holds a version."""

    serial: int
    checksum64: int
    """Recomputed from the tensors in the backend's memory, after loading."""
    canary_logprobs: tuple[float, ...]
    """The backend's log-probabilities of the canary."""
    server: str = ""
    """Which life of which server holds it; "" is the backend of the actor that shows the proof."""
