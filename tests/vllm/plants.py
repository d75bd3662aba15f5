"""The worker extension with faults to plant; it runs inside the server under test."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from slipstream.inference.vllm.extension import SlipstreamWorker


class PlantedWorker(SlipstreamWorker):
    """What the engine's extension does, and `plant` and `linger`."""

    def plant(self, fault: str) -> None:
        """Plant a fault, or with "" take all out."""
        engine: Any = self.weight_transfer_engine
        engine.__dict__.pop("_tie_head", None)
        model: Any = engine.model
        model.__dict__.pop("load_weights", None)
        match fault:
            case "stale head":
                engine._tie_head = lambda: None
            case "breaks off once":
                model.load_weights = lambda tensors: self._break_off(model, tensors)
            case "breaks off":
                model.load_weights = _broken
            case "loses a tensor":
                load = model.load_weights
                model.load_weights = lambda tensors: load(
                    (name, tensor)
                    for name, tensor in tensors
                    if name != "model.layers.0.self_attn.o_proj.weight"
                )

    def linger(self, seconds: float) -> None:
        """Make each step of the server take so much longer; 0 takes that out."""
        worker: Any = self
        worker.__dict__.pop("execute_model", None)
        if seconds:
            execute = worker.execute_model

            def slowly(*arguments: Any, **named: Any) -> Any:
                time.sleep(seconds)
                return execute(*arguments, **named)

            worker.execute_model = slowly

    def _break_off(self, model: Any, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Load one tensor and fail; later calls are sound."""
        model.__dict__.pop("load_weights")
        model.load_weights(iter([next(tensors)]))
        raise RuntimeError("planted: broke off")


def _broken(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    raise RuntimeError("planted: broke off")
