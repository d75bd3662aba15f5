"""Floor 4. The optimizer step that learner and warm-up share.

A step sees packed micro-batches (packing.py), runs the decoder once on each, hands hidden states and
head to the kernels, and lets AdamW move the weights. Losses and gradients that are not finite, or spike,
never reach the weights: the update is skipped and counted, weights and AdamW's state keep every bit.

Dimensions: T packed tokens, N trained tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding
from transformers import PreTrainedModel

from slipstream.attention import PackedSegments, run_decoder
from slipstream.config import OptimConfig
from slipstream.errors import CheckpointError, NumericsError
from slipstream.flight_recorder import FLIGHT
from slipstream.guard import LARGEST, SpikeGuard
from slipstream.model import head
from slipstream.packing import PackedBatch
from slipstream_kernels import linear_logprob


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBatch:
    """A micro-batch on the model's device, with the rows of its trained tokens picked out."""

    tokens_T: Tensor
    positions_T: Tensor
    segments: PackedSegments
    rows_N: Tensor
    """[N] int64: packed tokens whose hidden state predicts a trained token."""
    labels_N: Tensor
    """[N] int64: the trained tokens themselves."""
    weight_N: Tensor
    behavior_N: Tensor
    advantage_N: Tensor
    cu_seqlens_B: Tensor
    """[B + 1] int64: where segments start among the N trained tokens."""
    inverse_temperature: float | Tensor
    """[N] where they were not all sampled at one temperature."""

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device) -> DeviceBatch:
        """Copy a packed micro-batch to `device`, keeping trained tokens only beside the decoder's inputs."""
        trained = np.flatnonzero(batch.weight > 0)
        inverse = 1.0 / batch.temperatures[trained]
        mixed = inverse.size > 0 and inverse.min() < inverse.max()
        shared = float(inverse[0]) if inverse.size else 1.0
        counts = np.add.reduceat(batch.weight > 0, batch.cu_seqlens[:-1], dtype=np.int64)

        def put(array: NDArray[Any], kind: torch.dtype) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=kind)

        return cls(
            tokens_T=put(batch.token_ids, torch.int64),
            positions_T=put(batch.positions, torch.int64),
            segments=PackedSegments(batch.cu_seqlens, device, path=batch.path, shared=batch.shared),
            rows_N=put(batch.path[trained - 1], torch.int64),
            labels_N=put(batch.token_ids[batch.path[trained]], torch.int64),
            weight_N=put(batch.weight[trained], torch.float32),
            behavior_N=put(batch.behavior_logprobs[trained], torch.float32),
            advantage_N=put(batch.advantages[trained], torch.float32),
            cu_seqlens_B=put(np.concatenate([[0], np.cumsum(counts)]), torch.int64),
            inverse_temperature=put(inverse, torch.float32) if mixed else shared,
        )


def trained_hidden(model: PreTrainedModel, batch: DeviceBatch) -> Tensor:
    """Return the [N, H] hidden states that predict the trained tokens."""
    hidden_TH = run_decoder(model, batch.tokens_T, batch.positions_T, batch.segments)
    return embedding(batch.rows_N, hidden_TH)


@torch.no_grad()
def score(model: PreTrainedModel, batch: DeviceBatch) -> Tensor:
    """Return the [N] log-probabilities of the trained tokens under `model`, each as it was tempered."""
    logprob_N, _, _ = linear_logprob(
        trained_hidden(model, batch),
        head(model),
        batch.labels_N,
        inverse_temperature=batch.inverse_temperature,
    )
    return logprob_N


def schedule(step: int, *, steps: int, config: OptimConfig) -> float:
    """Return the learning rate's share at `step`: a linear rise times a linear fall to `final_share`."""
    rise = min((step + 1) / (config.warmup_steps + 1), 1.0)
    progress = min(step / max(steps, 1), 1.0)
    return rise * (1.0 - (1.0 - config.final_share) * progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one update did."""

    grad_norm: float
    """Before clipping; NaN when there was no gradient."""
    learning_rate: float
    fault: str = ""
    """Why weights and AdamW's state were left as they are, or "" when they moved."""


class Optimizer:
    """AdamW over a model, with clipping and a guard against values that are not finite or spike.

    Weights, gradients and AdamW's state are float32 here: of a model in bfloat16 it keeps a copy, to which
    updates too small for bfloat16 add up, and rounds it into the model after each.
    """

    def __init__(self, model: PreTrainedModel, config: OptimConfig) -> None:
        self._model = model
        self._config = config
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names, self._parameters = list(trained), list(trained.values())
        self._masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self._parameters]
        self._rounded = [(p, m) for p, m in zip(self._parameters, self._masters, strict=True) if p is not m]
        self._adam = torch.optim.AdamW(
            self._masters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            foreach=True,
        )
        self._guard = SpikeGuard(config.spike_factor)
        self.skipped_in_a_row = 0
        self.skipped = 0

    def step(self, losses: Sequence[Callable[[], Tensor]], *, share: float) -> Update:
        """Add up the gradients of `losses`, clip, update.

        Each loss is a function so that one micro-batch's activations are freed before the next begins.
        `share` scales the learning rate. Raises NumericsError after `max_skips` skipped updates in a row,
        and at once when the weights themselves are no numbers.
        """
        total, norm = self._gradient(losses)
        fault = self._guard.fault(total, norm)
        if fault:
            return self.skip(fault, norm)
        torch.nn.utils.clip_grads_with_norm_(
            self._masters, self._config.max_grad_norm, torch.tensor(norm), foreach=True
        )
        for group in self._adam.param_groups:
            group["lr"] = self._config.learning_rate * share
        self._adam.step()
        self._round()
        self._check_weights()
        self._guard.accept(total, norm)
        self.skipped_in_a_row = 0
        return Update(grad_norm=norm, learning_rate=self._config.learning_rate * share)

    def skip(self, fault: str, norm: float = math.nan) -> Update:
        """Count an update that is left out because of `fault`; raises NumericsError as `step` does."""
        self._adam.zero_grad(set_to_none=True)
        self._check_weights()
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self._config.max_skips:
            raise NumericsError(
                f"{fault}, and {self.skipped_in_a_row} updates in a row were skipped; "
                "lower optim.learning_rate or look at the quarantined batches"
            )
        return Update(grad_norm=norm, learning_rate=0.0, fault=fault)

    def _gradient(self, losses: Sequence[Callable[[], Tensor]]) -> tuple[float, float]:
        """Leave the gradient in the masters; return the sum of the losses, and the gradient's norm."""
        self._adam.zero_grad(set_to_none=True)
        total = 0.0
        for loss in losses:
            FLIGHT.beat()
            value = loss()
            total += float(value.detach())
            if not math.isfinite(total):
                return total, math.nan
            value.backward()
            self._collect()
        gradients = [master.grad for master in self._masters if master.grad is not None]
        return total, float(torch.nn.utils.get_total_norm(gradients))

    def _collect(self) -> None:
        """Move gradients in a smaller type to the masters, where those of all micro-batches add up."""
        for parameter, master in self._rounded:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)

    @torch.no_grad()
    def _round(self) -> None:
        """Round the masters into the parameters."""
        for parameter, master in self._rounded:
            parameter.copy_(master)

    def _check_weights(self) -> None:
        """Raise NumericsError when a weight is no number, or absurd: nobody may publish these."""
        with torch.no_grad():
            largest = float(torch.nn.utils.get_total_norm(self._parameters, norm_type=math.inf))
        if not largest <= LARGEST:
            raise NumericsError(
                f"the largest weight is {largest:g}: memory or AdamW's state is damaged; "
                "continue from the last checkpoint with --resume"
            )

    def guard_state(self) -> dict[str, Any]:
        """Return the guard's counters and history as plain data for a checkpoint."""
        return {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "accepted": self._guard.state(),
        }

    def load_guard_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `guard_state` gave."""
        self.skipped = int(state["skipped"])
        self.skipped_in_a_row = int(state["skipped_in_a_row"])
        self._guard.load_state(state["accepted"])

    def state_tensors(self) -> dict[str, Tensor]:
        """Return copies of AdamW's state as named tensors: exp_avg.NAME, exp_avg_sq.NAME, step.NAME.

        The first two have the shape of the parameter NAME, the step has shape []. Of a parameter that is not
        float32 itself there is master.NAME too.
        """
        tensors = {}
        for name, parameter, master in zip(self._names, self._parameters, self._masters, strict=True):
            for key, value in self._adam.state[master].items():
                tensors[f"{key}.{name}"] = value.detach().clone()
            if master is not parameter:
                tensors[f"master.{name}"] = master.clone()
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` gave; raises CheckpointError when it belongs to another model."""
        states: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            # Kinds hold no dot, names do.
            kind, _, name = key.partition(".")
            states.setdefault(name, {})[kind] = value.clone()
        odd = sorted(states.keys() ^ set(self._names))
        if states and odd:
            raise CheckpointError(f"optimizer state does not fit the model: {odd[0]} is on one side only")
        for name, master in zip(self._names, self._masters, strict=True):
            state = states.get(name, {})
            if "master" in state:
                master.copy_(state.pop("master"))
            self._adam.state[master] = state
        self._round()
