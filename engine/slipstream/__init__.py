"""Floor 7. Asynchronous reinforcement learning for agents that call tools: public names, loaded when used.

Importing this package imports neither torch nor transformers nor zmq.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slipstream.authoring.environment import environment
    from slipstream.authoring.episode import Episode
    from slipstream.authoring.folders import dataset
    from slipstream.authoring.rewards import Invalid, PolicyFault, metric, monitor, reward
    from slipstream.authoring.tasks import jsonl
    from slipstream.authoring.tools import Tool, tool, tool_call
    from slipstream.config import RunConfig, load_config
    from slipstream.errors import SlipstreamError, ToolError, UserError
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
    from slipstream.judging.judge import Judge
    from slipstream.judging.rubric import Rubric
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
    "Episode",
    "InferenceBackend",
    "Invalid",
    "Judge",
    "Observation",
    "Outcome",
    "PolicyFault",
    "Rubric",
    "RunConfig",
    "Sampling",
    "Score",
    "ScoreKind",
    "SlipstreamError",
    "Split",
    "Task",
    "TaskSource",
    "Tool",
    "ToolError",
    "ToolSpec",
    "Trajectory",
    "TrajectorySink",
    "Transition",
    "UserError",
    "Version",
    "WeightPublisher",
    "WeightSubscriber",
    "__version__",
    "dataset",
    "environment",
    "jsonl",
    "load_config",
    "metric",
    "monitor",
    "reward",
    "tool",
    "tool_call",
]

_NAMES_OF_MODULE = {
    "authoring.environment": "environment",
    "authoring.episode": "Episode",
    "authoring.folders": "dataset",
    "authoring.rewards": "Invalid PolicyFault metric monitor reward",
    "authoring.tasks": "jsonl",
    "authoring.tools": "Tool tool tool_call",
    "config": "RunConfig load_config",
    "errors": "SlipstreamError ToolError UserError",
    "interfaces": (
        "AssistantMessage Environment InferenceBackend Observation TaskSource ToolSpec TrajectorySink"
        " Transition WeightPublisher WeightSubscriber"
    ),
    "judging.judge": "Judge",
    "judging.rubric": "Rubric",
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
