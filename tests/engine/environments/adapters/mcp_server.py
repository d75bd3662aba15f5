"""An MCP server of the standard library alone, with tools that misbehave in each way a server can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CAPITALS = {"Norway": "Oslo", "Italy": "Rome", "Japan": "Tokyo"}
STATE = Path(os.environ["STATE"])
"""A folder that outlasts one life of the server."""


def tool(name: str, *arguments: str) -> dict[str, Any]:
    properties = {argument: {"type": "string"} for argument in arguments}
    schema = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"name": name, "description": f"{name} it", "inputSchema": schema}


TOOLS = [
    tool("capital", "country"),
    *map(
        tool,
        ("raises", "refuses", "odd", "huge", "babbles", "never", "freezes", "dies", "dies_once", "spawns"),
    ),
    tool("changes"),
]


def say(message: dict[str, Any]) -> None:
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)


def text(said: str, *, wrong: bool = False) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": said}], "isError": wrong}


def carried_out(name: str, arguments: dict[str, str]) -> dict[str, Any] | None:
    match name:
        case "capital" if arguments["country"] in CAPITALS:
            return text(CAPITALS[arguments["country"]])
        case "capital" | "raises":
            return text("no such country", wrong=True)
        case "odd":
            return {"answer": 42}
        case "huge":
            return text("x" * (2 << 20))
        case "babbles":
            print("Loading model ...\n[1, 2]", flush=True)
            return text("well")
        case "freezes":
            time.sleep(600)
        case "dies":
            sys.exit("out of memory")
        case "dies_once" if not (STATE / "died").exists():
            (STATE / "died").touch()
            os._exit(1)
        case "dies_once":
            return text("back")
        case "spawns":
            child = subprocess.Popen(["sleep", "600"])
            return text(str(child.pid))
        case "changes":
            TOOLS[0] = tool("capital", "land")
            say({"method": "notifications/tools/list_changed"})
            return text("changed")
    return None


def answered(method: str, params: dict[str, Any]) -> dict[str, Any] | None:
    match method:
        case "initialize":
            about = {"name": "atlas", "version": "7.1"}
            return {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": about}
        case "tools/list":
            if "cursor" in params:
                return {"tools": TOOLS[1:]}
            return {"tools": TOOLS[:1], "nextCursor": "1"}
        case "ping":
            return {}
    return carried_out(params["name"], params["arguments"])


if __name__ == "__main__":
    with (STATE / "lives").open("a") as lives:
        lives.write(f"{os.getpid()}\n")
    say({"id": "theirs", "method": "roots/list"})
    for line in sys.stdin:
        message = json.loads(line)
        if message.get("id") is None or "method" not in message:
            with (STATE / "told").open("a") as told:
                told.write(json.dumps(message) + "\n")
        elif message.get("params", {}).get("name") == "refuses":
            say({"id": message["id"], "error": {"code": -32602, "message": "Unknown tool: refuses"}})
        elif (result := answered(message["method"], message["params"])) is not None:
            say({"id": message["id"], "result": result})
