"""Floor 7. Asynchronous reinforcement learning for agents that call tools: public names, loaded when used.

Importing this package imports neither torch nor transformers nor zmq.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slipstream.config import RunConfig, load_config
    from slipstream.errors import SlipstreamError, UserError
    from slipstream.interfaces import (
        AssistantMessage,
        Environment,
        InferenceBackend,
        Observation,
        TaskSource,
        ToolSpec,
        TrajectorySink,
        Transition,
        WeightPublisher,
        WeightSubscriber,
    )
    from slipstream.types import (
        Completion,
        Outcome,
        Sampling,
        Score,
        ScoreKind,
        Split,
        Task,
        Trajectory,
        Version,
    )

__version__ = "0.1.0"

__all__ = [
    "AssistantMessage",
    "Completion",
    "Environment",
    "InferenceBackend",
    "Observation",
    "Outcome",
    "RunConfig",
    "Sampling",
    "Score",
    "ScoreKind",
    "SlipstreamError",
    "Split",
    "Task",
    "TaskSource",
    "ToolSpec",
    "Trajectory",
    "TrajectorySink",
    "Transition",
    "UserError",
    "Version",
    "WeightPublisher",
    "WeightSubscriber",
    "__version__",
    "load_config",
]

_NAMES_OF_MODULE = {
    "config": "RunConfig load_config",
    "errors": "SlipstreamError UserError",
    "interfaces": (
        "AssistantMessage Environment InferenceBackend Observation TaskSource ToolSpec TrajectorySink"
        " Transition WeightPublisher WeightSubscriber"
    ),
    "types": "Completion Outcome Sampling Score ScoreKind Split Task Trajectory Version",
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """Import the module that defines `name`, on its first use."""
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
