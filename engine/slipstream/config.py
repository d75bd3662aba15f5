"""Floor 1. The configuration of a run: frozen models, one TOML file, dotted overrides.

Every default is the vetted setting of the `research` recipe. Unknown keys are errors that name the file, the key and the
nearest valid key. Loading opens the recipe's file and nothing else.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slipstream.errors import ConfigurationError

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Part(BaseModel):
    """Base of every part: frozen, no unknown keys, no silent conversions from strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class EnvironmentConfig(Part):
    """The world the policy acts in."""

    name: Literal["research"] = "research"
    hops: int = Field(default=1, ge=1, le=4)
    """Facts to chain before the answer is known."""
    documents_per_fact: int = Field(default=3, ge=1, le=8)
    """One true document and this many less one near misses."""
    tool_failure_rate: Share = 0.1
    """Share of search and open calls that return a seeded, standard error."""
    tool_latency_s: float = Field(default=0.0, ge=0.0)
    """Added to each tool call."""
    max_turns: int = Field(default=10, ge=1)
    max_tokens: int = Field(default=256, ge=16)
    """Most tokens of one episode, prompt and observations included."""
    timeout_s: float = Field(default=60.0, gt=0.0)


class ModelConfig(Part):
    """The policy: a local Hugging Face folder, or a small Llama built from these sizes."""

    path: str = ""
    """Folder of a causal language model with tokenizer and chat template; empty: build one."""
    hidden_size: int = Field(default=96, ge=8)
    intermediate_size: int = Field(default=256, ge=8)
    layers: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"


class WarmupConfig(Part):
    """Supervised warm start on demonstrations of a scripted expert."""

    demonstrations: int = Field(default=4096, ge=1)
    careful_share: Share = 0.3
    """Share of demonstrations that retry errors and read on past near misses; the others do not."""
    batch: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0.0)
    max_steps: int = Field(default=600, ge=1)
    check_every: int = Field(default=100, ge=1)
    """Steps between held-out evaluations."""
    target_success: Share = 0.40
    """Stop as soon as held-out success reaches this."""
    min_success: Share = 0.20
    """Below this after max_steps the run stops: reinforcement learning would have too little to select from."""
    max_success: Share = 0.55
    """Above this the warm start is reported as stronger than the learnable band."""


class SamplingConfig(Part):
    """How training episodes are sampled; top-p and top-k do not exist here, they bias importance ratios."""

    temperature: float = Field(default=1.0, gt=0.0)
    max_tokens: int = Field(default=24, ge=1)
    """Most tokens of one assistant message."""


class ActorConfig(Part):
    """One actor process."""

    count: int = Field(default=1, ge=1)
    concurrency: int = Field(default=128, ge=1)
    """Live episodes, and the constant batch of a decode step."""
    threads: int = Field(default=1, ge=1)


class BatchConfig(Part):
    """What one optimizer step consumes."""

    groups: int = Field(default=16, ge=1)
    group_size: int = Field(default=8, ge=1)
    token_budget: int = Field(default=16384, ge=64)
    """Most tokens of one micro-batch."""

    @property
    def trajectories(self) -> int:
        """Trajectories of one step: groups x group_size."""
        return self.groups * self.group_size


class ObjectiveConfig(Part):
    """Decoupled PPO with a trust region against the behavior policy."""

    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    clip_high: float = Field(default=0.28, gt=0.0)
    importance_cap: float = Field(default=2.0, ge=1.0)
    """Truncates proximal / behavior ratios from above."""
    trust_low: float = Field(default=0.5, gt=0.0, le=1.0)
    trust_high: float = Field(default=2.0, ge=1.0)
    """Tokens whose current / behavior ratio leaves [trust_low, trust_high] lose their gradient."""
    kl_coefficient: float = Field(default=0.01, ge=0.0)
    """Weight of the k2 penalty towards the frozen warm-start policy."""
    entropy_coefficient: float = Field(default=0.0, ge=0.0)
    advantage: Literal["mean", "std", "rloo"] = "mean"
    """Group baseline: mean only (Dr. GRPO), mean and standard deviation (GRPO), leave one out (RLOO)."""
    std_floor: float = Field(default=0.3, ge=0.0)
    """Least divisor when advantage is "std"."""


class RewardConfig(Part):
    """Outcome +1 or -1 dominates; penalties and shaping are capped per trajectory."""

    step_penalty: float = Field(default=0.05, ge=0.0)
    invalid_penalty: float = Field(default=0.2, ge=0.0)
    shaping: float = Field(default=0.0, ge=0.0)
    """Weight of the optional progress score in [0, 1]."""
    penalty_cap: float = Field(default=0.8, ge=0.0)
    """Most that all penalties of one trajectory may take away."""


class OptimConfig(Part):
    """AdamW and its guards."""

    learning_rate: float = Field(default=1e-3, gt=0.0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    warmup_steps: int = Field(default=5, ge=0)
    final_share: Share = 0.2
    """The learning rate falls linearly to this share of itself at the last step."""
    minibatches: int = Field(default=1, ge=1)
    """Optimizer updates one step makes from its batch."""
    max_skips: int = Field(default=5, ge=1)
    """Non-finite steps in a row after which the run stops."""


class LearnerConfig(Part):
    """The learner process."""

    threads: int = Field(default=1, ge=1)


class EvaluationConfig(Part):
    """Held-out evaluation, each pinned to one version."""

    every: int = Field(default=25, ge=1)
    tasks: int = Field(default=256, ge=1)
    final_tasks: int = Field(default=1024, ge=1)
    temperature: float = Field(default=1.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)


class CheckpointConfig(Part):
    """When the learner saves itself."""

    every: int = Field(default=25, ge=1)
    keep: int = Field(default=2, ge=1)


class HubConfig(Part):
    """Where roles meet."""

    address: str = "tcp://127.0.0.1:*"
    """Bind address; a star takes a free port."""
    credit_bytes: int = Field(default=64 << 20, ge=1 << 16)
    """Bytes an actor may have on the way before the hub's acknowledgement."""
    lease_timeout_s: float = Field(default=120.0, gt=0.0)
    """A lease not returned by then is given to another actor."""
    memory_limit_bytes: int = Field(default=2 << 30, ge=1 << 28)
    durability: Literal["process", "power"] = "process"
    """"process" survives kill -9; "power" also fsyncs before each acknowledgement."""
    segment_bytes: int = Field(default=64 << 20, ge=1 << 16)
    """Size at which the ingest log starts a new file."""


class RunConfig(Part):
    """A whole run."""

    seed: int = Field(default=1, ge=0)
    steps: int = Field(default=400, ge=1)
    max_slip: int = Field(default=4, ge=0)
    """How many versions old a token may be when it is trained."""
    device: str = "auto"
    """"auto" takes a GPU where there is one."""
    environment: EnvironmentConfig = EnvironmentConfig()
    model: ModelConfig = ModelConfig()
    warmup: WarmupConfig = WarmupConfig()
    sampling: SamplingConfig = SamplingConfig()
    actor: ActorConfig = ActorConfig()
    batch: BatchConfig = BatchConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    rewards: RewardConfig = RewardConfig()
    optim: OptimConfig = OptimConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    hub: HubConfig = HubConfig()
