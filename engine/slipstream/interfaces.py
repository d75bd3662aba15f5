"""Floor 1. Every Protocol on one page: what a part must do to stand in the house."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from slipstream.types import (
    Completion,
    Int32Array,
    Lease,
    Sampling,
    Score,
    Split,
    Task,
    TaskAttempt,
    ToolCall,
    Trajectory,
    WeightProof,
    WeightUpdate,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """A tool as the policy sees it; `parameters` is a JSON schema in OpenAI's form."""

    name: str
    description: str
    parameters: dict[str, Any]
    pure: bool = False
    """Whether equal arguments in an equal state of its world give equal results, and change nothing."""
    version: str = ""
    """Of a pure tool: another one once it, or its world, answers otherwise than before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AssistantMessage:
    """One message of the policy, already parsed."""

    text: str
    """What was sampled, decoded."""
    name: str = ""
    """Tool called; empty when `error` is set, and for plain text, which only a `Conversing` one is given."""
    arguments: dict[str, Any] | None = None
    error: str = ""
    """Why the text is not a valid tool call; empty when it is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What an episode starts with."""

    system: str
    user: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """What a message led to."""

    observation: str
    """What the policy is shown; unused when done."""
    done: bool
    call: ToolCall | None = None
    """The call as it was carried out; None when the message held none."""
    reward: float = 0.0
    """Reward earned in this turn apart from the outcome."""
    role: Literal["tool", "user"] = "tool"
    """Who says the observation."""


@runtime_checkable
class Environment(Protocol):
    """One episode's world. A new object serves each episode."""

    tools: Sequence[ToolSpec]

    async def reset(self, task: Task, attempt: TaskAttempt) -> Observation:
        """Start an episode; all randomness is keyed by `attempt`. Called again when the ground failed."""

    async def step(self, message: AssistantMessage) -> Transition:
        """Carry one message out."""

    async def score(self) -> Sequence[Score]:
        """Judge the episode so far, after its end; called again when the ground failed."""


@runtime_checkable
class Conversing(Environment, Protocol):
    """An environment with somebody to talk to: a message without a call is no mistake in it."""

    converses: bool
    """True."""


@runtime_checkable
class Resumable(Environment, Protocol):
    """An environment whose episode can go on in another object, or another process.

    A sandbox needs it to outlive a worker that a tool brought down and to judge where no tool ran; the
    engine needs it to try a step again whose ground failed.
    """

    secrets: Collection[str]
    """Keys of `Task.data` that only `score` reads: what plays the episode in a sandbox never gets them."""

    def state(self) -> dict[str, Any]:
        """Return all that has happened, as plain data; what is returned does not change later."""

    async def restore(self, task: Task, attempt: TaskAttempt, state: dict[str, Any]) -> None:
        """Be where the object was that gave `state` for this attempt."""


class TaskSource(Protocol):
    """Gives tasks by split and index, for ever and always the same."""

    def task(self, split: Split, index: int) -> Task:
        """Return the task at `index` of `split`."""


@runtime_checkable
class Checked(Protocol):
    """A task source that can tell beforehand what is wrong with it."""

    def check(self) -> None:
        """Raise ConfigurationError with one sentence."""


class InferenceBackend(Protocol):
    """Samples from a policy."""

    async def generate(self, token_ids: Int32Array, sampling: Sampling, *, rollout_id: int) -> Completion:
        """Sample one message after the [T] tokens of a rollout.

        `rollout_id` keys the KV cache (each call extends the tokens of the last) and, with the
        token's position, the random numbers.
        """

    def release(self, rollout_id: int) -> None:
        """Forget a rollout's KV cache."""

    async def load(self, update: WeightUpdate) -> WeightProof:
        """Take new weights between two decode steps and prove it."""


class Sampler(InferenceBackend, Protocol):
    """A backend with a life of its own, as an actor keeps it."""

    serial: int
    """Of the weights that it holds and has proven, or -1."""
    tokens_generated: int

    def announce(self, update: WeightUpdate) -> None:
        """Learn of published weights, which some server may hold before they are loaded here."""

    async def run(self) -> None:
        """Serve, or watch what serves, until cancelled; an error in it ends the actor."""

    async def close(self) -> None:
        """End what it has started."""


class Runner(Protocol):
    """Runs leased episodes, many at once."""

    async def start(self) -> str:
        """Get ready; returns the address at which agents find it, or ""."""

    async def sampled(
        self, lease: Lease, backend: InferenceBackend, sampling: Sampling, *, rollout_id: int
    ) -> Trajectory:
        """Run one with a backend, which forgets the rollout whatever happens."""

    async def close(self) -> None:
        """End what the episodes share."""


class AgentProgram(Protocol):
    """An agent of any framework: `async def run(task, *, base_url, api_key) -> float | None`."""

    async def __call__(self, task: Task, *, base_url: str, api_key: str) -> float | None:
        """Do a task by asking the OpenAI-compatible `base_url` under `api_key`; return the reward.

        None: the rewards posted to the gateway count.
        """


class TrajectorySink(Protocol):
    """The actor's end of the way to the hub."""

    async def send(self, trajectory: Trajectory) -> None:
        """Make a trajectory durable and send it; waits while the hub grants no credit."""


class WeightPublisher(Protocol):
    """The learner's end of a weight transport."""

    def publish(self, tensors: dict[str, Any], *, serial: int) -> str:
        """Write the tensors under a new serial and return the folder that holds them."""


class WeightSubscriber(Protocol):
    """The backend's end of a weight transport."""

    def fetch(self, update: WeightUpdate) -> dict[str, Any]:
        """Return the published tensors, memory-mapped, checked against their manifest."""
