"""Floor 1. The parts of a run's configuration that say how it is trained and on what."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from slipstream.config_base import Part, Share


class InferenceConfig(Part):
    """What samples training episodes; evaluations are always sampled in the actor."""

    backend: Literal["embedded", "vllm"] = "embedded"
    """PyTorch in each actor, or vLLM servers that all actors share (`slipstream serve`)."""
    servers: int = Field(default=1, ge=1)
    """vLLM servers of one `slipstream serve`."""
    program: str = "vllm"
    """vLLM's command line, by name or path, in an environment of its own; .venv-vllm/bin/vllm if none is on
    the path."""
    attach: tuple[str, ...] = ()
    """Addresses of running servers to use instead, started with the arguments that `serve` gives its own."""
    transport: Literal["filesystem", "gloo", "delta", "nccl"] = "filesystem"
    """How weights reach a server: from the folder they are published in; broadcast over TCP, whole or only
    what changed; or from GPU to GPU."""
    requests: int = Field(default=64, ge=1)
    """Requests that a server works on at once."""
    eager: bool = True
    """Without compilation: faster to start, and the only sensible way on a CPU."""
    devices: tuple[str, ...] = ()
    """CUDA_VISIBLE_DEVICES of each server, such as "0" or "0,1"; empty: what the role has itself."""
    arguments: tuple[str, ...] = ()
    """More arguments of `vllm serve`."""
    host: str = "127.0.0.1"
    """Address at which actors reach the servers; vLLM itself always listens on the loopback."""
    insecure: bool = False
    """Allow an address beyond this machine, where requests and their key go unencrypted."""
    port: int = Field(default=0, ge=0, le=65535)
    """0: a free one."""


class ModelConfig(Part):
    """The policy: a local Hugging Face folder, or a small Llama built from these sizes."""

    path: str = ""
    """Folder of a causal language model with tokenizer and chat template; empty: build one."""
    hidden_size: int = Field(default=96, ge=8)
    intermediate_size: int = Field(default=256, ge=8)
    """With a multiple of 64 a token's bits do not depend on what is computed beside it."""
    layers: int = Field(default=2, ge=1)
    heads: int = Field(default=3, ge=1)
    vocabulary: int = Field(default=2048, ge=512, le=65536)
    """Most entries of the tokenizer that is trained for it; the text of small environments needs fewer."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of weights and activations, the optimizer keeps float32; "auto": bfloat16 on a GPU, else float32."""
    call_format: Literal["hermes", "qwen3.5", "llama3"] = "hermes"
    """How the model of `path` writes tool calls (call_formats.py)."""


class WarmupConfig(Part):
    """Supervised warm start on demonstrations of the environment's scripts."""

    demonstrations: int = Field(default=65536, ge=1)
    """Different demonstrations; they are shown in order, again from the first after the last."""
    careful_share: Share = 0.3
    """Share of demonstrations that retry errors and read on past near misses; the others do not."""
    careful_recovery: bool = True
    """Whether these teach what to turn to after a failed call. False: the name of the next tool is not
    trained there; long episodes are learnt from them, trying again is left to reinforcement learning."""
    chats: str = ""
    """JSONL file of conversations of your own, which are imitated too (chats.py)."""
    chats_share: Share = 0.5
    """Share of each batch that is theirs; 1, or an environment without a script: they alone."""
    batch: int = Field(default=64, ge=1)
    environment: dict[str, Any] = Field(default_factory=dict)
    """What differs from [environment] in demonstrations, and in the tasks that target_success is about, as in
    a stage of a curriculum: what the warm start need not know yet."""
    learning_rate: float = Field(default=3e-3, gt=0.0)
    max_steps: int = Field(default=600, ge=0)
    """0: no warm start, the model is trained as it is."""
    min_steps: int = Field(default=200, ge=0)
    """Never stop before: exact copying comes later than the format and the first successes."""
    check_every: int = Field(default=50, ge=1)
    """Steps between held-out evaluations."""
    target_success: Share = 0.40
    """Stop once held-out success reaches this, after min_steps."""
    min_success: Share = 0.20
    """Below this after max_steps the run stops: too little for reinforcement learning to select from."""
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
    token_budget: int = Field(default=4096, ge=64)
    """Most distinct tokens of one micro-batch: what trajectories begin alike with counts once."""

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
    """A token's current / behavior ratio is carried no further out of [trust_low, trust_high]; what leads
    back into it, and the penalty, stay."""
    kl_coefficient: float = Field(default=0.01, ge=0.0)
    """Weight of the k2 penalty towards the frozen warm-start policy."""
    entropy_coefficient: float = Field(default=0.0, ge=0.0)
    advantage: Literal["mean", "std", "rloo"] = "mean"
    """Group baseline: mean only (Dr. GRPO), mean and standard deviation (GRPO), leave one out (RLOO)."""
    std_floor: float = Field(default=0.3, ge=0.0)
    """Least divisor when advantage is "std"."""


class OptimConfig(Part):
    """AdamW and its guards."""

    learning_rate: float = Field(default=1.5e-4, gt=0.0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    warmup_steps: int = Field(default=5, ge=0)
    final_share: Share = 0.2
    """The learning rate falls linearly to this share of itself at the last step."""
    minibatches: int = Field(default=1, ge=1)
    """Optimizer updates one step makes from its batch."""
    spike_factor: float = Field(default=20.0, ge=0.0)
    """A loss or gradient norm this many times the usual (guard.py) skips its update; 0 never does, nor does
    the warm start."""
    max_skips: int = Field(default=5, ge=1)
    """Updates skipped in a row, for values that are not finite or spike, after which the run stops."""


class LearnerConfig(Part):
    """The learner process."""

    threads: int = Field(default=1, ge=1)


class BaselineConfig(Part):
    """A score to compare with, of somebody else's policy."""

    name: str
    score: float = Field(ge=0.0, le=1.0)
    """Its success on the same kind of task."""
    source: str
    """Who measured it, and where that is written."""
    date: str
    """When."""


class MonitorConfig(Part):
    """Limits of the signs of a degenerate policy (monitors.py): shares, ratios, a gap; 0 watches nothing."""

    repeated_calls: float = Field(default=0.2, ge=0.0)
    no_end: float = Field(default=0.5, ge=0.0)
    no_call: float = Field(default=0.5, ge=0.0)
    one_answer: float = Field(default=0.5, ge=0.0)
    length_growth: float = Field(default=2.0, ge=0.0)
    verifier_gap: float = Field(default=0.2, ge=0.0)
    """Mean success minus the mean of the held-out verifier."""
    verifier: str = "verifier"
    """Metric from 0 to 1, of a @metric or a judge, that success is compared with; "" compares with none."""
    heldout_gap: float = Field(default=0.3, ge=0.0)
    """Mean success of the last batches minus an evaluation's; not compared where a curriculum has stages,
    which pose other tasks."""


class EvaluationConfig(Part):
    """Held-out evaluation, each pinned to one version."""

    every: int = Field(default=20, ge=1)
    tasks: int = Field(default=256, ge=1)
    final_tasks: int = Field(default=1024, ge=1)
    temperature: float = Field(default=1.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    baselines: tuple[BaselineConfig, ...] = ()
    """`[[evaluation.baselines]]`: dashed lines in each curve, beside those of the environment's scripts."""


class CheckpointConfig(Part):
    """When the learner saves itself."""

    every: int = Field(default=20, ge=1)
    keep: int = Field(default=2, ge=1)
    background: bool = True
    """Written beside the training, from a copy of weights and optimizer state; False waits for the disk."""


class HubConfig(Part):
    """Where roles meet."""

    address: str = "tcp://127.0.0.1:*"
    """Bind address; a star takes a free port. Beyond this machine it needs `keys`, or `insecure`."""
    keys: str = ""
    """Folder of `slipstream keys`: only its clients come in, encrypted, each under its own name."""
    insecure: bool = False
    """Lets anyone who reaches the address join, and whoever is on the way read and change everything."""
    max_connections: int = Field(default=4096, ge=16)
    """Beyond so many the oldest that have not joined are cut."""
    hello_timeout_s: float = Field(default=30.0, gt=0.0)
    """A connection without keys that has not joined by then is cut; a client tries again by itself."""
    credit_bytes: int = Field(default=8 << 20, ge=1 << 16)
    """Bytes an actor may have on the way before the hub's acknowledgement."""
    lease_timeout_s: float = Field(default=120.0, gt=0.0)
    """A lease not returned by then is given to another actor."""
    give_up_after: int = Field(default=32, ge=0)
    """Infrastructure failures of an episode, while others succeed, that its task is left out for; 0: none."""
    memory_limit_bytes: int = Field(default=2 << 30, ge=1 << 28)
    durability: Literal["process", "power"] = "process"
    """"process" survives kill -9; "power" also fsyncs before each acknowledgement."""
    segment_bytes: int = Field(default=64 << 20, ge=1 << 16)
    """Size at which the ingest log starts a new file."""
    retain_bytes: int = Field(default=16 << 30, ge=0)
    """Bytes of the log that are kept for reading, beyond what a restart needs."""
    reserve_bytes: int = Field(default=256 << 20, ge=0)
    """With less room than this on the disk no episode begins; those that run still reach the log."""


class TrackingConfig(Part):
    """Where the rows of metrics.jsonl go too; none of it can hold a run up (tracking/)."""

    wandb: str = ""
    """Project in Weights & Biases; empty: not there. Where and as whom is for its own variables to say."""
    tensorboard: bool = False
    """Whether events for TensorBoard are written into the run's folder `tensorboard`."""
    grace_s: float = Field(default=20.0, ge=0.0)
    """How long the end of a run waits for what is still on its way there."""


class SupervisionConfig(Part):
    """How the launcher keeps its processes going, and how it ends them."""

    restarts: int = Field(default=5, ge=0)
    """Most deaths of the hub, of the learner and of each process of the other stages within an hour."""
    actor_restarts: int = Field(default=5, ge=0)
    """Most deaths of each actor within an hour."""
    backoff_s: float = Field(default=0.5, ge=0.0)
    """Pause before the first restart of a process; doubles with each death, up to a minute."""
    grace_s: float = Field(default=30.0, gt=0.0)
    """From SIGTERM to SIGKILL: the learner saves a checkpoint, actors deliver what they have."""
