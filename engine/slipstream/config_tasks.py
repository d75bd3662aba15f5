"""Floor 1. The parts of a run's configuration that say what is done, by whom, and what it is worth."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from slipstream.config_base import Part, Share
from slipstream.config_parts import ObjectiveConfig
from slipstream.errors import ConfigurationError

OUTCOME_GAP = 2.0
"""Distance between the rewards of a success (+1) and a failure (-1) before penalties and shaping."""

DOMINANCE_MARGIN = 0.1
"""Least reward by which the worst success must beat the best failure."""


class SandboxConfig(Part):
    """What one worker of a sandbox may use, and how long one call of it may take."""

    call_timeout_s: float = Field(default=10.0, gt=0.0)
    """A call that takes longer is killed with all it started; the policy is told."""
    memory_bytes: int = Field(default=1 << 30, ge=256 << 20)
    """Address space of each process of a worker."""
    scratch_bytes: int = Field(default=64 << 20, ge=1 << 20)
    """The worker's only writable folder."""
    processes: int = Field(default=32, ge=1)
    """Processes and threads of one worker."""
    open_files: int = Field(default=256, ge=16)
    cpu_s: int = Field(default=60, ge=1)
    """CPU time of each process of a worker."""
    answer_bytes: int = Field(default=1 << 20, ge=1 << 12)
    """Most bytes of one answer; larger ones are refused before they are read."""
    observation_chars: int = Field(default=16384, ge=64)
    """A longer observation is cut, and says so."""


class EnvironmentConfig(Part):
    """The world the policy acts in."""

    name: str = Field(default="research", min_length=1)
    """A shipped one (`slipstream env list`), some of which take a variant as in `name:variant`; or one of
    your own as `module:attribute` or `path.py:attribute`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keys of that environment alone."""
    tool_failure_rate: Share = 0.1
    """Share of calls of tools that may fail which return a seeded, standard error."""
    tool_latency_s: float = Field(default=0.0, ge=0.0)
    """What a call of a tool that looks something up takes longer; a result out of the cache comes at once."""
    tool_cache: str = Field(default="off", min_length=1)
    """Where results of pure tools are kept: "off", "run" (one file in the run's folder, for all its actors),
    or the path of a file of your own, for several runs."""
    tool_cache_bytes: int = Field(default=1 << 28, ge=1 << 20)
    """Size of that file from which the oldest results go."""
    tool_schemas: bool = False
    """Shows the policy each tool's description and the schema of its arguments, not their names alone."""
    max_turns: int = Field(default=10, ge=1)
    max_invalid: int = Field(default=3, ge=0)
    """Invalid messages an episode survives; one more ends it."""
    max_tokens: int = Field(default=256, ge=16)
    """Most tokens of one episode, prompt and observations included."""
    timeout_s: float = Field(default=60.0, gt=0.0)
    retries: int = Field(default=2, ge=0)
    """How often a failure of the environment's ground is tried again before the episode fails."""
    backoff_s: float = Field(default=0.1, ge=0.0)
    """Longest wait before the first retry; it doubles with each, and is drawn from 0 to there."""
    sandbox: Literal["none", "process", "bubblewrap", "auto"] = "none"
    """Where tools run: in the actor, or in workers of their own, judged in a worker no tool ran in."""
    limits: SandboxConfig = SandboxConfig()
    canaries: tuple[str, ...] = ()
    """Planted secrets: they are cut out of whatever the policy is shown, and out of records and logs."""


class AgentConfig(Part):
    """Who plays the episodes."""

    program: str = ""
    """`module:function` or `path.py:function`: an agent of one's own, given each task, the address of a
    gateway and a key, and asked for a reward; "outside": agents that ask a gateway for tasks; empty: the
    policy alone, in the environment's own loop."""
    port: int = Field(default=0, ge=0, le=65535)
    """Where the gateway of the first actor listens, the others at the ports behind it; 0: at free ones."""
    malformed_calls: Literal["keep", "penalise", "mask"] = "keep"
    """What becomes of a call that is none, which the agent reads as text: nothing more; it costs
    rewards.invalid_penalty; its tokens are not trained."""


class RewardConfig(Part):
    """Outcome +1 or -1 dominates; penalties and shaping are capped per trajectory."""

    step_penalty: float = Field(default=0.05, ge=0.0)
    """Taken for each turn. Where success is rare and takes many turns, giving up at once costs less than
    trying, and that is what a policy then learns; a warm start warns of it."""
    invalid_penalty: float = Field(default=0.2, ge=0.0)
    shaping: float = Field(default=0.0, ge=0.0)
    """Weight of the optional progress score in [0, 1]."""
    penalty_cap: float = Field(default=0.8, ge=0.0)
    """Most that all penalties of one trajectory may take away."""


def check_outcome_dominates(rewards: RewardConfig, objective: ObjectiveConfig, group_size: int) -> None:
    """Refuse rewards in which penalties and shaping could outweigh the outcome.

    With gap = 2 between the outcomes and spread s = penalty_cap + shaping, the worst success earns
    1 - penalty_cap and the best failure -1 + shaping; rewards keep the order of outcomes when

        gap - s >= margin.

    advantage = "mean" and "rloo" scale all rewards of a group alike and keep that order. "std"
    divides by max(std, std_floor), which differs between groups. In a group of equal outcomes
    advantages lie at most s / std_floor apart. In a mixed group of G a success and a failure lie
    at least (gap - s) / max(D, std_floor) apart, where D = sqrt(G / (G - 1)) (gap + s) / 2 is the
    largest standard deviation of G numbers within gap + s (Popoviciu's inequality with Bessel's
    correction). Demanded is

        s / std_floor < (gap - s) / max(D, std_floor);

    for large G and a small floor the right side is 2 (gap - s) / (gap + s).

    Sources: GRPO, Shao et al. 2024, section 4.1.2, arXiv:2402.03300; the bias of dividing by the
    standard deviation: Dr. GRPO, Liu et al. 2025, section 3.1, arXiv:2503.20783.
    """
    spread = rewards.penalty_cap + rewards.shaping
    if OUTCOME_GAP - spread < DOMINANCE_MARGIN:
        raise ConfigurationError(
            f"rewards.penalty_cap + rewards.shaping must be at most {OUTCOME_GAP - DOMINANCE_MARGIN:g}, "
            f"so that the worst success beats the best failure, got {spread:g}"
        )
    if objective.advantage != "std" or spread == 0.0:
        return
    floor = objective.std_floor
    largest_std = (group_size / (group_size - 1)) ** 0.5 * (OUTCOME_GAP + spread) / 2
    separation = (OUTCOME_GAP - spread) / max(largest_std, floor)
    if spread < floor * separation:
        return
    needed = spread * largest_std / (OUTCOME_GAP - spread)
    advice = f"objective.std_floor must be above {needed:.3g}, got {floor:g}"
    if needed > largest_std:
        advice = f"rewards.penalty_cap + rewards.shaping must be below {OUTCOME_GAP / 2:g}, got {spread:g}"
    raise ConfigurationError(
        'with objective.advantage = "std" penalties alone could give larger advantages than an outcome '
        f"does: {advice}"
    )
