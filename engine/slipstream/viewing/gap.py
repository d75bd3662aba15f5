"""Floor 5. The log-probability gap: what a checkpoint makes of an episode's tokens, beside what is recorded.

    gap_t = log pi(token_t) - log mu(token_t)      mu: at sampling time; pi: the checkpoint, same temperature

A run records mu alone: what the learner computes for its ratio is used up in the step. With the checkpoint
that sampled the tokens the gap is the numerical mismatch of sampler and learner; with a later one it is the
log importance ratio of the two policies.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slipstream.types import Float32Array, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slipstream.config import RunConfig


class GapScorer:
    """Scores episodes with one policy.

    Example: ``GapScorer.of(folder / "checkpoints" / "latest", config)(trajectory)``.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Score with a model that knows packed segments (attention.py)."""
        self._model = model

    @classmethod
    def of(cls, checkpoint: Path, config: RunConfig) -> GapScorer:
        """Load a policy; raises CheckpointError."""
        from slipstream.model import choose_device, load_policy

        return cls(load_policy(checkpoint, config=config.model, device=choose_device(config.device)).model)

    def __call__(self, trajectory: Trajectory) -> Float32Array | None:
        """Return the [T] gap in nats, NaN where no token was sampled or it begins a segment.

        None for an episode that was sampled greedily, or of another vocabulary.
        """
        from slipstream.model import head
        from slipstream.packing import pack
        from slipstream.training import DeviceBatch, score

        tokens = trajectory.token_ids
        vocabulary = int(self._model.config.vocab_size)
        if trajectory.sampling.temperature <= 0 or not ((tokens >= 0) & (tokens < vocabulary)).all():
            return None
        gap_T = np.full(len(tokens), np.nan, np.float32)
        for span in trajectory.spans:
            part = _part(trajectory, span)
            packed = pack([part], np.zeros(1, np.float32), [part.loss_mask.astype(np.float32)],
                          token_budget=max(1, len(part.token_ids)))  # fmt: skip
            for batch in packed:
                trained = np.flatnonzero(batch.weight > 0)
                if len(trained):
                    device = DeviceBatch.of(batch, head(self._model).device)
                    logprob_N = score(self._model, device)
                    behavior_N = batch.behavior_logprobs[trained]
                    gap_T[span.start + trained] = logprob_N.float().cpu().numpy() - behavior_N
        return gap_T


def _part(trajectory: Trajectory, span: slice) -> Trajectory:
    """Return one segment as an episode of its own."""
    arrays = ("token_ids", "loss_mask", "behavior_logprobs", "versions", "turns")
    cut = {name: getattr(trajectory, name)[span] for name in arrays}
    return dataclasses.replace(trajectory, segments=(), **cut)
