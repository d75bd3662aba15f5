"""Floor 4. One reinforcement-learning step: a batch of trajectories in, moved weights and metrics out.

trajectories ─▶ advantages ─▶ over-age tokens masked ─▶ packed micro-batches ─▶ frozen policy scores them (KL)
             ─▶ per minibatch: decoder ─▶ linear_policy_loss ─▶ AdamW
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from slipstream.config import RunConfig
from slipstream.model import head
from slipstream.objective import advantages, kernel_objective
from slipstream.packing import pack
from slipstream.rewards import components
from slipstream.training import DeviceBatch, Optimizer, schedule, score, trained_hidden
from slipstream.types import Float32Array, Int32Array, ToolStatus, Trajectory
from slipstream_kernels import PolicyMetrics, finish_metrics, linear_policy_loss, merge_metrics


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepResult:
    """What one step did."""

    metrics: Mapping[str, float]
    tokens_trained: int
    skipped: bool
    """True when a non-finite value kept the weights as they were."""


class PolicyStep:
    """Moves a policy by decoupled PPO; holds the optimizer and the frozen reference policy."""

    def __init__(self, model: PreTrainedModel, reference: PreTrainedModel | None, config: RunConfig) -> None:
        """`reference` is needed while `objective.kl_coefficient` is positive."""
        # Dropout would make the trained policy another than the one that sampled.
        self._model = model.eval()
        self._reference = reference.eval().requires_grad_(False) if reference is not None else None
        self._config = config
        self._device = head(model).device
        self._objective = kernel_objective(config.objective)
        self.optimizer = Optimizer(model, config.optim)

    def __call__(
        self, trajectories: Sequence[Trajectory], slips: Sequence[Int32Array], *, step: int
    ) -> StepResult:
        """Train on whole groups after `step` steps; `slips` holds each trajectory's [T] slip."""
        config = self._config
        worth = advantages(trajectories, config.objective, config.rewards)
        fresh = [slip <= config.max_slip for slip in slips]
        weights = [
            (t.loss_mask * young * np.isfinite(value)).astype(np.float32)
            for t, young, value in zip(trajectories, fresh, worth.rewards, strict=True)
        ]
        parts = [
            self._batches(trajectories, worth.advantages, weights, chosen)
            for chosen in self._minibatches(trajectories)
        ]
        share = schedule(step, steps=config.steps, config=config.optim)
        proximals = [self._proximals(part) for part in parts]
        kernel_metrics: list[PolicyMetrics] = []
        updates = [
            self.optimizer.step(self._losses(part, proximal, kernel_metrics), share=share)
            for part, proximal in zip(parts, proximals, strict=True)
            if part
        ]
        sampled = sum(int(t.loss_mask.sum()) for t in trajectories)
        over_age = sum(int(t.loss_mask[~young].sum()) for t, young in zip(trajectories, fresh, strict=True))
        trained = sum(int(weight.sum()) for weight in weights)
        read = _readable(kernel_metrics)
        metrics = {
            **read,
            **(updates[-1] if updates else {}),
            **describe(trajectories),
            "reward": float(np.nanmean(worth.rewards)) if np.isfinite(worth.rewards).any() else 0.0,
            "groups/zero_variance": worth.zero_variance_share,
            "masked": 1.0 - trained * (1.0 - read.get("masked/trust", 0.0)) / max(sampled, 1),
            "masked/over_age": over_age / max(sampled, 1),
        }
        return StepResult(
            metrics=metrics,
            tokens_trained=trained,
            skipped=any(update["skipped"] for update in updates),
        )

    def _minibatches(self, trajectories: Sequence[Trajectory]) -> list[list[int]]:
        """Split trajectory indices into whole groups, one list per optimizer update."""
        groups: dict[int, list[int]] = {}
        for index, trajectory in enumerate(trajectories):
            groups.setdefault(trajectory.attempt.group, []).append(index)
        count = min(self._config.optim.minibatches, len(groups))
        shares = np.array_split(np.arange(len(groups)), count)
        listed = list(groups.values())
        return [[index for group in share for index in listed[group]] for share in shares]

    def _batches(
        self,
        trajectories: Sequence[Trajectory],
        worth: Float32Array,
        weights: Sequence[Float32Array],
        chosen: Sequence[int],
    ) -> list[DeviceBatch]:
        packed = pack(
            [trajectories[i] for i in chosen],
            worth[np.array(chosen)],
            [weights[i] for i in chosen],
            token_budget=self._config.batch.token_budget,
        )
        return [DeviceBatch.of(batch, self._device) for batch in packed if batch.weight.any()]

    def _proximals(self, part: Sequence[DeviceBatch]) -> list[Tensor | None]:
        """Return log-probabilities before this step; None: those of the loss itself, detached."""
        if self._config.optim.minibatches == 1:
            return [None] * len(part)
        return [score(self._model, batch, temperature=self._config.sampling.temperature) for batch in part]

    def _losses(
        self,
        part: Sequence[DeviceBatch],
        proximals: Sequence[Tensor | None],
        sink: list[PolicyMetrics],
    ) -> list[Callable[[], Tensor]]:
        # Token mean over the whole minibatch, counted before the trust region masks any token.
        divisor = sum((batch.weight_N.sum() for batch in part), torch.zeros((), device=self._device))
        return [
            self._loss(batch, proximal, divisor, sink)
            for batch, proximal in zip(part, proximals, strict=True)
        ]

    def _loss(
        self, batch: DeviceBatch, proximal_N: Tensor | None, divisor: Tensor, sink: list[PolicyMetrics]
    ) -> Callable[[], Tensor]:
        temperature = self._config.sampling.temperature

        def loss() -> Tensor:
            reference_N = None
            if self._reference is not None and self._objective.kl_coefficient > 0:
                reference_N = score(self._reference, batch, temperature=temperature)
            result = linear_policy_loss(
                trained_hidden(self._model, batch),
                head(self._model),
                batch.labels_N,
                inverse_temperature=1.0 / temperature,
                behavior_N=batch.behavior_N,
                proximal_N=proximal_N,
                reference_N=reference_N,
                advantage_N=batch.advantage_N,
                weight_N=batch.weight_N,
                cu_seqlens=batch.cu_seqlens_B,
                objective=self._objective,
                normalizer=divisor,
            )
            sink.append(result.metrics)
            return result.loss

        return loss


def _readable(parts: Sequence[PolicyMetrics]) -> dict[str, float]:
    """Return the kernels' metrics of a whole step under the names of metrics.py."""
    if not parts:
        return {}
    values = {name: float(value) for name, value in finish_metrics(merge_metrics(parts)).items()}
    values["masked/trust"] = values.pop("masked")
    values["kl/reference"] = values.pop("reference/k2")
    del values["token_count"]
    values["loss"] = sum(value for name, value in values.items() if name.startswith("loss/"))
    return values


def describe(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return the metrics that need no model: success, turns, rewards, outcomes, tools."""
    calls = [call for t in trajectories for call in t.tool_calls]
    messages = sum(len(t.turn_rewards) for t in trajectories)
    means: dict[str, float] = {
        "success": float(np.mean([t.success for t in trajectories])),
        "turns": float(np.mean([len(t.turn_rewards) for t in trajectories])),
        "length": float(np.mean([len(t.token_ids) for t in trajectories])),
        "tools/success": float(np.mean([call.status is ToolStatus.OK for call in calls])) if calls else 0.0,
        "tools/valid": len(calls) / max(messages, 1),
    }
    for trajectory in trajectories:
        for name, value in components(trajectory.scores).items():
            means[f"reward/{name}"] = means.get(f"reward/{name}", 0.0) + value / len(trajectories)
        key = f"outcome/{trajectory.outcome}"
        means[key] = means.get(key, 0.0) + 1.0 / len(trajectories)
    return means
