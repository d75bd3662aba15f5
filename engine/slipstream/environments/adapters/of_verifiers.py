"""Floor 4. Tasksets of verifiers 0.4, in its interpreter: tools called and rewards asked in one process.

Its own rollouts start a harness and a tool server each, which takes seconds; here tools are called where
they stand, and the trace that rewards, metrics and stops read is written by hand.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
from typing import Any

from slipstream.environments.adapters.worker import Adapter, Refusal, attribute, awaited, numbers, reason


class Verifiers(Adapter):
    """A `Taskset` of verifiers 0.4: its tasks, its toolsets in this process, its rewards on a trace."""

    package, distribution, converses = "verifiers", "verifiers", True
    INFINITE = 4096
    """Tasks that are taken of a taskset without end."""

    def __init__(self, entry: str, arguments: dict[str, Any]) -> None:
        super().__init__(entry, arguments)
        self.vf = importlib.import_module("verifiers.v1")
        concrete = importlib.import_module("verifiers.v1.utils.generic").concrete_type
        made = attribute(entry)
        config = concrete(made, self.vf.TasksetConfig) or self.vf.TasksetConfig
        taskset = made(config(**arguments))
        self.tasks = list(taskset if taskset.bounded else taskset.take(self.INFINITE))
        if not self.tasks:
            raise Refusal("entry", f"{entry} has no task")
        self._refuse_runtimes(self.tasks[0])
        self.shared = [awaited(self._served(each, None)) for each in made.toolsets(taskset.config)]

    def tools(self) -> list[dict[str, Any]]:
        """Return the tools of all toolsets, under the names that its own agents see."""
        own = self.tasks[0]
        served = [*self.shared, *[awaited(self._served(each, None)) for each in self._toolsets(own)]]
        return [tool for each in served for tool in each.listed]

    def questions(self) -> list[str]:
        """Return the prompts."""
        return [each.data.prompt_text for each in self.tasks]

    def episode(self, task: dict[str, Any], seed: int) -> Any:
        """Return an episode of the task at the row's number."""
        return VerifiersEpisode(self, self.tasks[task["data"]["row"]])

    def trace(self, task: Any) -> Any:
        """Return a trace that nobody has said anything in."""
        trace = importlib.import_module("verifiers.v1.trace")
        state = importlib.import_module("verifiers.v1.state").state_cls(type(task))
        return self.vf.Trace(
            task=trace.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
            state=state(),
            agent=trace.AgentInfo(config=self.vf.AgentConfig(), name="policy"),
        )

    async def served_for(self, task: Any, trace: Any) -> dict[str, Any]:
        """Return, by tool, who carries out its calls."""
        own = [await self._served(each, trace, task) for each in self._toolsets(task)]
        return {tool["name"]: each for each in (*self.shared, *own) for tool in each.listed}

    def _toolsets(self, task: Any) -> list[Any]:
        return list(type(task).toolsets(task.config))

    async def _served(self, toolset: Any, trace: Any, task: Any = None) -> Any:
        served = ServedToolset(toolset, trace)
        await served.start(task)
        return served

    def _refuse_runtimes(self, task: Any) -> None:
        """Refuse what would be scored without some of its rewards."""
        signals = [*task.hooks("reward"), *task.hooks("metric")]
        needy = [each.__name__ for each in signals if "runtime" in inspect.signature(each).parameters]
        if type(task).NEEDS_CONTAINER or needy:
            what = f"its {needy[0]} does" if needy else "its tasks do"
            raise Refusal("entry", f"{self.entry} needs a runtime of its own ({what})")
        for stop in task.hooks("stop"):
            if "trace" not in inspect.signature(stop).parameters:
                raise Refusal("entry", f"{self.entry}: its stop {stop.__name__} does not take the trace")


class ServedToolset:
    """A toolset whose calls are carried out here, where its own servers would speak HTTP."""

    def __init__(self, toolset: Any, trace: Any) -> None:
        self._toolset = toolset
        server = importlib.import_module("mcp.server.mcpserver")
        self._server = server.MCPServer(toolset.server_name or type(toolset).__name__)
        if trace is not None:
            # In its own process it would fetch the rollout's state over HTTP.
            toolset._pull_state = lambda: ready(trace.state)
            toolset._push_state = lambda before: ready(None)

    async def start(self, task: Any) -> None:
        """Set the toolset up and list its tools."""
        await self._toolset.setup()
        if task is not None:
            await self._toolset.setup_task(task.data)
        self._toolset.register(self._server)
        prefix = f"{self._toolset.server_name}_" if self._toolset.server_name else ""
        self._prefix = len(prefix)
        self.listed = [
            {
                "name": f"{prefix}{tool.name}",
                "description": tool.description or "",
                "parameters": getattr(tool, "input_schema", None) or tool.inputSchema,
            }
            for tool in await self._server.list_tools()
        ]

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Call a tool and return its text."""
        result = await self._server.call_tool(name[self._prefix :], arguments)
        blocks = getattr(result, "content", None)
        if blocks is None:
            blocks = result[0] if isinstance(result, tuple) else result
        return "\n".join(getattr(block, "text", "") or f"[{block.type}]" for block in blocks)


class VerifiersEpisode:
    """One episode: messages are put into a trace, which the task's own rewards judge."""

    def __init__(self, adapter: Verifiers, task: Any) -> None:
        self._adapter, self._task = adapter, task
        self._types = importlib.import_module("verifiers.v1.types")
        self._node = importlib.import_module("verifiers.v1.graph").MessageNode
        self._calls = 0

    def reset(self) -> dict[str, Any]:
        """Start the task and its toolsets."""
        return dict(awaited(self._reset()))

    def step(self, text: str, name: str, arguments: dict[str, Any] | None) -> dict[str, Any]:
        """Carry a call out; a message without one is the last."""
        return dict(awaited(self._step(text, name, arguments)))

    def score(self) -> dict[str, Any]:
        """Let the task judge the trace."""
        return dict(awaited(self._score()))

    def close(self) -> None:
        """Nothing is held."""

    async def _reset(self) -> dict[str, Any]:
        self._trace = self._adapter.trace(self._task)
        await self._task.setup(self._trace, None)
        self._served = await self._adapter.served_for(self._task, self._trace)
        data, types = self._task.data, self._types
        if data.system_prompt:
            self._say(types.SystemMessage(content=data.system_prompt))
        self._say(types.UserMessage(content=data.prompt_text))
        return {"system": data.system_prompt or "", "user": data.prompt_text}

    async def _step(self, text: str, name: str, arguments: dict[str, Any] | None) -> dict[str, Any]:
        types = self._types
        if arguments is None:
            self._say(types.AssistantMessage(content=text), sampled=True)
            return {"text": "", "role": "tool", "reward": 0.0, "done": True}
        self._calls += 1
        call = types.ToolCall(id=f"call_{self._calls}", name=name, arguments=json.dumps(arguments))
        self._say(types.AssistantMessage(content=None, tool_calls=[call]), sampled=True)
        calling = asyncio.ensure_future(self._served[name].call(name, arguments))
        await asyncio.wait({calling})
        error = calling.exception()
        shown = calling.result() if error is None else f"error: {reason(error)}"
        self._say(types.ToolMessage(tool_call_id=call.id, content=shown, name=name))
        return {
            "text": shown,
            "role": "tool",
            "reward": 0.0,
            "failed": error is not None,
            "done": await self._stopped(),
        }

    async def _stopped(self) -> bool:
        for stop in self._task.hooks("stop"):
            found = stop(trace=self._trace)
            if await settled(found):
                self._trace.stop(stop.__name__)
                return True
        return False

    async def _score(self) -> dict[str, Any]:
        await self._task.finalize(self._trace, None)
        await self._task.score(self._trace)
        return {"reward": self._trace.reward, "metrics": numbers(self._trace.metrics)}

    def _say(self, message: Any, *, sampled: bool = False) -> None:
        nodes = self._trace.nodes
        parent = len(nodes) - 1 if nodes else None
        nodes.append(self._node(parent=parent, message=message, sampled=sampled))


async def ready(value: Any) -> Any:
    """Return a value that is there."""
    return value


async def settled(value: Any) -> Any:
    """Return a value, or what a coroutine returns."""
    return await value if inspect.isawaitable(value) else value


ADAPTER = Verifiers
