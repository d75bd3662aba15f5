"""Floor 4. A client of one MCP server over its standard input and output: JSON-RPC 2.0, a message a line.

    ours    initialize, notifications/initialized, tools/list (page by page), tools/call,
            notifications/cancelled for a call that took too long, ping
    theirs  ping is answered; other requests (sampling, roots, elicitation) are refused

The server runs in whatever interpreter its command names, and the part of the protocol that tools need is
this small: the `mcp` package, whose pins conflict with those of other environments, is not needed here.

Source: Model Context Protocol, specification of 2025-06-18, lifecycle, transports and tools.
"""

from __future__ import annotations

import asyncio
import json
import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from slipstream.environments.adapters.foreign import (
    PONG_S,
    CallTimeout,
    Foreign,
    Lines,
    Message,
    Oversized,
)
from slipstream.errors import InfrastructureError, ToolError
from slipstream.interfaces import ToolSpec
from slipstream.tools.wording import BROKE_PROTOCOL, TOO_MUCH

VERSIONS: Final = ("2025-06-18", "2025-11-25", "2025-03-26", "2024-11-05")
"""Of the protocol, the one asked for first; they say the same of tools as far as we use them."""
MOST_PAGES: Final = 64
_METHOD_NOT_FOUND: Final = -32601

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """What a server says of itself."""

    server: str
    version: str
    tools: tuple[ToolSpec, ...]

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of the tools' names, descriptions and schemas."""
        listed = [(tool.name, tool.description, tool.parameters) for tool in self.tools]
        return sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()[:12]


class McpServer:
    """One shared server, started again when it has ended. Its methods run on the loop of `foreign`.

    Tools stay as they were first listed, whatever a later list says: a run's prompts are made of them.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        variables: Mapping[str, str],
        answer_bytes: int,
        start_s: float,
    ) -> None:
        self._command, self._variables = command, variables
        self._answer_bytes, self._start_s = answer_bytes, start_s
        self._life: Foreign | None = None
        self._first: Greeting | None = None
        self._changed = False
        self._stale = False
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int:
        """Of the server that runs, or -1."""
        return -1 if self._life is None else self._life.pid

    async def greeting(self) -> Greeting:
        """Return what the first server said of itself, started if none was; raises InfrastructureError."""
        await self._alive()
        assert self._first is not None
        return self._first

    async def call(self, name: str, arguments: Mapping[str, Any], seconds: float) -> tuple[str, bool]:
        """Call a tool; returns its text and whether it is an error.

        Raises ToolError for what the server refuses, answers wrongly or not in time, and
        InfrastructureError when it ends or answers nothing at all.
        """
        life = await self._alive()
        if self._stale:
            self._stale = False
            assert self._first is not None
            self._compare(await self._listed(life, self._first))
        try:
            answer = await life.call(
                _request("tools/call", {"name": name, "arguments": dict(arguments)}), seconds
            )
        except Oversized:
            raise ToolError(TOO_MUCH) from None
        except CallTimeout as error:
            await life.send(_notice("notifications/cancelled", {"requestId": int(str(error))}))
            await self._expect_pong(life)
            raise ToolError(f"tool did not answer within {seconds:g} s") from None
        if "error" in answer:
            raise ToolError(_reason(answer["error"]))
        return _text(answer.get("result"))

    async def close(self) -> None:
        """Kill it with all it started."""
        if self._life is not None:
            await self._life.close()

    async def _alive(self) -> Foreign:
        async with asyncio.timeout(2 * self._start_s), self._starting:
            if self._life is None or self._life.ended:
                if self._life is not None:
                    log.warning("%s; starting another", self._life.ended)
                self._life = None
                self._life = await self._started()
            return self._life

    async def _started(self) -> Foreign:
        life = await Foreign.start(
            self._command,
            name=f"MCP server {self._command[-1]}",
            framing=Lines(),
            most_bytes=self._answer_bytes,
            variables=self._variables,
        )
        # Of a server that is forgotten its life must not remind anybody: it ends with it.
        server = weakref.ref(self)
        life.told = lambda message: _heard(server(), life, message)
        weakref.finalize(self, life.kill)
        try:
            self._compare(await self._listed(life, await self._greeted(life)))
        except BaseException:
            await life.close()
            raise
        return life

    async def _greeted(self, life: Foreign) -> Greeting:
        said = await self._asked(
            life,
            "initialize",
            {
                "protocolVersion": VERSIONS[0],
                "capabilities": {},
                "clientInfo": {"name": "slipstream", "version": "1"},
            },
        )
        spoken, about = said.get("protocolVersion"), said.get("serverInfo")
        if spoken not in VERSIONS:
            raise InfrastructureError(
                f"{life.name}: expected MCP {', '.join(VERSIONS)}, got {str(spoken)[:40]!r}"
            )
        await life.send(_notice("notifications/initialized", {}))
        about = about if isinstance(about, dict) else {}
        return Greeting(
            server=str(about.get("name", ""))[:80], version=str(about.get("version", ""))[:80], tools=()
        )

    async def _listed(self, life: Foreign, greeting: Greeting) -> Greeting:
        tools: list[ToolSpec] = []
        cursor: dict[str, Any] = {}
        for _ in range(MOST_PAGES):
            page = await self._asked(life, "tools/list", cursor)
            listed = page.get("tools")
            if not isinstance(listed, list):
                raise InfrastructureError(f"{life.name}: expected a list of tools, got none")
            tools += [_spec(each, life.name) for each in listed]
            if not page.get("nextCursor"):
                return Greeting(server=greeting.server, version=greeting.version, tools=tuple(tools))
            cursor = {"cursor": page["nextCursor"]}
        raise InfrastructureError(f"{life.name}: expected at most {MOST_PAGES} pages of tools, got more")

    async def _asked(self, life: Foreign, method: str, params: dict[str, Any]) -> Message:
        """Return the result of what no policy asks for; raises InfrastructureError."""
        try:
            answer = await life.call(_request(method, params), self._start_s)
        except CallTimeout:
            raise InfrastructureError(
                f"{life.name}: no answer to {method} within {self._start_s:g} s"
            ) from None
        except Oversized as error:
            raise InfrastructureError(f"{life.name}: {method}: {error}") from None
        result = answer.get("result")
        if not isinstance(result, dict):
            raise InfrastructureError(f"{life.name}: {method}: {_reason(answer.get('error'))}")
        return result

    async def _expect_pong(self, life: Foreign) -> None:
        """Tell a server with one slow call from one that hangs: that one is killed, its calls fail."""
        try:
            await life.call(_request("ping", {}), PONG_S)
        except CallTimeout:
            life.end(f"answered nothing for {PONG_S:g} s and was killed")
            raise InfrastructureError(life.ended) from None

    def _compare(self, greeting: Greeting) -> None:
        """Keep the first greeting; say once when a later one differs."""
        first = self._first = self._first or greeting
        if greeting == first or self._changed:
            return
        self._changed = True
        log.warning(
            "MCP server %s: in mid-run it changed %s; the run keeps the tools it began with, and calls that "
            "no longer fit are the server's to refuse",
            self._command[-1],
            _difference(first, greeting),
        )

    def _told(self, life: Foreign, message: Message) -> None:
        """Heed what the server says by itself."""
        method, number = message.get("method"), message.get("id")
        if method == "notifications/tools/list_changed":
            self._stale = True
        elif method is not None and number is not None:
            answer: Message = {"jsonrpc": "2.0", "id": number}
            if method == "ping":
                answer["result"] = {}
            else:
                answer["error"] = {"code": _METHOD_NOT_FOUND, "message": f"no {str(method)[:80]} here"}
            self._answering = asyncio.ensure_future(_sent(life, answer))


def _heard(server: McpServer | None, life: Foreign, message: Message) -> None:
    if server is not None:
        server._told(life, message)


async def _sent(life: Foreign, message: Message) -> None:
    try:
        await life.send(message)
    except InfrastructureError as error:
        log.debug("%s", error)


def _request(method: str, params: dict[str, Any]) -> Message:
    return {"jsonrpc": "2.0", "method": method, "params": params}


_notice = _request
"""The same without a number, which `Foreign.call` adds."""


def _spec(listed: Any, name: str) -> ToolSpec:
    """Return a listed tool as ours; raises InfrastructureError."""
    schema = listed.get("inputSchema") if isinstance(listed, dict) else None
    if not isinstance(schema, dict) or not isinstance(listed.get("name"), str):
        raise InfrastructureError(f"{name}: expected tools with name and inputSchema, got {str(listed)[:80]}")
    parameters = {key: value for key, value in schema.items() if key != "$schema"}
    parameters.setdefault("type", "object")
    parameters.setdefault("properties", {})
    return ToolSpec(
        name=listed["name"], description=str(listed.get("description") or ""), parameters=parameters
    )


def _text(result: Any) -> tuple[str, bool]:
    content = result.get("content") if isinstance(result, dict) else None
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise ToolError(BROKE_PROTOCOL)
    said = [_block(block) for block in content]
    if not said and "structuredContent" in result:
        said = [json.dumps(result["structuredContent"], ensure_ascii=False)]
    return "\n".join(said), result.get("isError") is True


def _block(block: Mapping[str, Any]) -> str:
    """Return a block of content as text; what is none is named."""
    match block.get("type"):
        case "text":
            return str(block.get("text", ""))
        case "resource" if isinstance(block.get("resource"), dict):
            held = block["resource"]
            return str(held.get("text") or f"[resource {held.get('uri', '')}]")
        case "resource_link":
            return f"[resource {block.get('uri', '')}]"
        case kind:
            return f"[{kind} {block.get('mimeType', '')}]"


def _reason(error: Any) -> str:
    said = error.get("message") if isinstance(error, dict) else None
    return " ".join(str(said or BROKE_PROTOCOL).split())


def _difference(first: Greeting, later: Greeting) -> str:
    before, after = ({tool.name: tool for tool in each.tools} for each in (first, later))
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        return f"its tools ({', '.join(changed)})"
    return f"from {first.server} {first.version} to {later.server} {later.version}"
