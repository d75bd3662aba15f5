"""Floor 4. One reinforcement-learning step: a batch of trajectories in, moved weights and metrics out.

trajectories ─▶ advantages ─▶ over-age tokens masked ─▶ packed micro-batches ─▶ frozen policy scores them (KL)
             ─▶ per minibatch: decoder ─▶ linear_policy_loss ─▶ AdamW

A value in the batch that no optimizer may see skips the whole step. A loss or gradient that is not finite, or
spikes, skips its own minibatch's update alone: minibatches are whole groups, so that the step is then the
one of a batch without those groups. What was skipped is written down with its identities (guard.py).
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from slipstream.config import RunConfig
from slipstream.errors import NumericsError
from slipstream.flight_recorder import FLIGHT
from slipstream.guard import batch_fault
from slipstream.model import head
from slipstream.objective import Advantages, advantages, group_weights, kernel_objective
from slipstream.packing import pack
from slipstream.rewards import components, shown
from slipstream.training import DeviceBatch, Optimizer, Update, schedule, score, trained_hidden
from slipstream.types import Float32Array, Int32Array, ToolStatus, Trajectory, TrajectoryId
from slipstream_kernels import PolicyMetrics, finish_metrics, linear_policy_loss, merge_metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An update that was left out."""

    reason: str
    trajectories: tuple[int, ...]
    """Whose they would have been, as indices of the batch."""
    of_batch: bool = False
    """True when a value in the batch was at fault, False for the loss or its gradient."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepResult:
    """What one step did."""

    metrics: Mapping[str, float]
    tokens_trained: int
    faults: tuple[Fault, ...] = ()

    @property
    def skipped(self) -> bool:
        """True when a value that is not finite, or a spike, kept an update from the weights."""
        return bool(self.faults)


class PolicyStep:
    """Moves a policy by decoupled PPO; holds the optimizer and the frozen reference policy."""

    def __init__(
        self,
        model: PreTrainedModel,
        reference: PreTrainedModel | None,
        config: RunConfig,
        *,
        quarantine: Path | None = None,
    ) -> None:
        """`reference` is needed while `objective.kl_coefficient` is positive.

        Into the folder `quarantine` goes a file with the reason and the identities of each update left out.
        """
        # Dropout would make the trained policy another than the one that sampled.
        self._model = model.eval()
        self._reference = reference.eval().requires_grad_(False) if reference is not None else None
        self._config = config
        self._device = head(model).device
        self._objective = kernel_objective(config.objective)
        self._quarantine = quarantine
        self._files: list[Path] = []
        """Of the updates left out since the last one made."""
        self.optimizer = Optimizer(model, config.optim)

    def __call__(
        self, trajectories: Sequence[Trajectory], slips: Sequence[Int32Array], *, step: int
    ) -> StepResult:
        """Train on whole groups after `step` steps; `slips` holds each trajectory's [T] slip.

        Raises NumericsError after `optim.max_skips` updates in a row that were left out, naming step, reason
        and quarantine.
        """
        config = self._config
        worth = advantages(trajectories, config.objective, config.rewards)
        fresh = [slip <= config.max_slip for slip in slips]
        shares = group_weights(trajectories, worth.rewards, config.curriculum)
        weights = [
            (t.loss_mask * young * np.isfinite(value)).astype(np.float32) * share
            for t, young, value, share in zip(trajectories, fresh, worth.rewards, shares, strict=True)
        ]
        kernel_metrics: list[PolicyMetrics] = []
        explored: list[Tensor] = []
        if reason := batch_fault(trajectories, worth.rewards, worth.advantages):
            everything = range(len(trajectories))
            moves = [self._guarded(lambda: self.optimizer.skip(reason), trajectories, everything, step)]
        else:
            moves = self._moves(trajectories, worth, weights, step, kernel_metrics, explored)
        faults = tuple(
            Fault(reason=update.fault, trajectories=tuple(chosen), of_batch=bool(reason))
            for chosen, update in moves
            if update.fault
        )
        skipped = {index for fault in faults for index in fault.trajectories}
        trained = sum(
            int(np.count_nonzero(weight)) for index, weight in enumerate(weights) if index not in skipped
        )
        sampled = sum(int(t.loss_mask.sum()) for t in trajectories)
        over_age = sum(int(t.loss_mask[~young].sum()) for t, young in zip(trajectories, fresh, strict=True))
        read = _readable(kernel_metrics)
        last = moves[-1][1] if moves else None
        metrics = {
            **read,
            **({"kl/exploration": float(torch.cat(explored).mean())} if explored else {}),
            **({"grad_norm": last.grad_norm, "learning_rate": last.learning_rate} if last else {}),
            **describe(trajectories),
            "reward": float(np.nanmean(worth.rewards)) if np.isfinite(worth.rewards).any() else 0.0,
            "groups/zero_variance": worth.zero_variance_share,
            "masked": 1.0 - trained * (1.0 - read.get("masked/trust", 0.0)) / max(sampled, 1),
            "masked/over_age": over_age / max(sampled, 1),
            "skipped/batch": float(sum(fault.of_batch for fault in faults)),
            "skipped/update": float(sum(not fault.of_batch for fault in faults)),
        }
        return StepResult(metrics=metrics, tokens_trained=trained, faults=faults)

    def _moves(
        self,
        trajectories: Sequence[Trajectory],
        worth: Advantages,
        weights: Sequence[Float32Array],
        step: int,
        sink: list[PolicyMetrics],
        explored: list[Tensor],
    ) -> list[tuple[Sequence[int], Update]]:
        """Make one update per minibatch that has trained tokens; return its trajectories and what it did."""
        chosen = self._minibatches(trajectories)
        parts = [self._batches(trajectories, worth.advantages, weights, indices) for indices in chosen]
        explored += self._explored([batch for part in parts for batch in part])
        share = schedule(step, steps=self._config.steps, config=self._config.optim)
        proximals = [self._proximals(part) for part in parts]
        moves: list[tuple[Sequence[int], Update]] = []
        for indices, part, proximal in zip(chosen, parts, proximals, strict=True):
            if part:
                losses = self._losses(part, proximal, sink)
                move = functools.partial(self.optimizer.step, losses, share=share)
                moves.append(self._guarded(move, trajectories, indices, step))
        return moves

    def _guarded(
        self, move: Callable[[], Update], trajectories: Sequence[Trajectory], chosen: Sequence[int], step: int
    ) -> tuple[Sequence[int], Update]:
        """Make an update; one that is left out goes into quarantine, also when it ends the run."""
        identities = [trajectories[index].identity for index in chosen]
        try:
            update = move()
        except NumericsError as error:
            self._write_down(step, str(error), identities)
            files = ", ".join(map(str, self._files)) or "nowhere"
            raise NumericsError(f"step {step}: {error} (quarantined: {files})") from error
        if update.fault:
            self._write_down(step, update.fault, identities)
        else:
            self._files.clear()
        return chosen, update

    def _write_down(self, step: int, reason: str, identities: Sequence[TrajectoryId]) -> None:
        log.warning(
            "step %d: %s; weights unchanged, %d trajectories quarantined", step, reason, len(identities)
        )
        FLIGHT.note(f"step {step} skipped: {reason}")
        if self._quarantine is None:
            return
        self._quarantine.mkdir(parents=True, exist_ok=True)
        same_step = len(list(self._quarantine.glob(f"step-{step:08d}*.json")))
        suffix = f"-{same_step}" if same_step else ""
        self._files.append(self._quarantine / f"step-{step:08d}{suffix}.json")
        noted = {"step": step, "reason": reason, "identities": [asdict(identity) for identity in identities]}
        self._files[-1].write_text(json.dumps(noted, indent=1), encoding="utf-8")

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

    def _explored(self, batches: Sequence[DeviceBatch]) -> list[Tensor]:
        """Return log(behavior / reference) of the tokens, the reference at the configured temperature.

        The mean is the k1 estimate of how far sampling has gone from the warm start, its own warmth counted.
        Empty where no token was sampled warmer or colder than configured.
        """
        # Rounded as those of the batches are.
        usual = float(np.float32(1.0) / np.float32(self._config.sampling.temperature))
        heats = [batch.inverse_temperature for batch in batches]
        if self._reference is None or all(isinstance(heat, float) and heat == usual for heat in heats):
            return []
        return [
            batch.behavior_N - score(self._reference, replace(batch, inverse_temperature=usual))
            for batch in batches
        ]

    def _proximals(self, part: Sequence[DeviceBatch]) -> list[Tensor | None]:
        """Return log-probabilities before this step; None: those of the loss itself, detached."""
        if self._config.optim.minibatches == 1:
            return [None] * len(part)
        return [score(self._model, batch) for batch in part]

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
        def loss() -> Tensor:
            reference_N = None
            if self._reference is not None and self._objective.kl_coefficient > 0:
                reference_N = score(self._reference, batch)
            result = linear_policy_loss(
                trained_hidden(self._model, batch),
                head(self._model),
                batch.labels_N,
                inverse_temperature=batch.inverse_temperature,
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
        "tools/cached": float(np.mean([call.cached for call in calls])) if calls else 0.0,
        "tools/valid": len(calls) / max(messages, 1),
        **shown([t.scores for t in trajectories]),
    }
    for name, found in (
        ("tools/crashed", sum(call.status is ToolStatus.CRASHED for call in calls)),
        ("tools/cut", sum(call.cut for call in calls)),
    ):
        if found:
            means[name] = found / len(calls)
    for trajectory in trajectories:
        for name, value in components(trajectory.scores).items():
            means[f"reward/{name}"] = means.get(f"reward/{name}", 0.0) + value / len(trajectories)
        key = f"outcome/{trajectory.outcome}"
        means[key] = means.get(key, 0.0) + 1.0 / len(trajectories)
    return means
