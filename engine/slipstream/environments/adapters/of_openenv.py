"""Floor 4. Environments of openenv, in its interpreter or at a server: `reset(seed)`, `step(action)`."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from typing import Any
from urllib.request import urlopen

from slipstream.environments.adapters.worker import Adapter, Refusal, attribute, awaited


class OpenEnv(Adapter):
    """`reset(seed=...)`, `step(action)`; one tool, `act`, whose arguments are the action's fields."""

    package, distribution = "openenv", "openenv"

    def __init__(self, entry: str, arguments: dict[str, Any]) -> None:
        super().__init__(entry, dict(arguments))
        self.remote = entry.startswith(("ws://", "wss://", "http://", "https://"))
        action = self.arguments.pop("action", "")
        self.action = attribute(action) if action else None
        self.schema = self.arguments.pop("schema", None)
        if not self.remote:
            self.made = attribute(entry)
            self.concurrent = bool(getattr(self.made, "SUPPORTS_CONCURRENT_SESSIONS", False))
            if self.action is None:
                raise Refusal("entry", "its action is not named: give arguments.action = module:Action")
            return
        if self.action is None and self.schema is None:
            self.schema = remote_schema(entry)
        self.client = importlib.import_module("openenv.core").GenericEnvClient

    def tools(self) -> list[dict[str, Any]]:
        """Return `act`, with the schema of the action less what every action has."""
        schema = dict(self.action.model_json_schema() if self.action else self.schema)
        schema["properties"] = {k: v for k, v in schema.get("properties", {}).items() if k != "metadata"}
        about = (schema.pop("description", "") or "Act in the environment").strip().splitlines()[0]
        return [{"name": "act", "description": about, "parameters": schema}]

    def episode(self, task: dict[str, Any], seed: int) -> Any:
        """Return an episode in an object of its own, or in a session of its own at the server."""
        if self.remote:
            return RemoteOpenEnvEpisode(self.client(base_url=self.entry), task, seed)
        return OpenEnvEpisode(self.made(**self.arguments), self.action, task, seed)


class OpenEnvEpisode:
    """One episode; its reward is the sum of its observations'."""

    def __init__(self, environment: Any, action: Any, task: dict[str, Any], seed: int) -> None:
        self._environment, self._action = environment, action
        self._seed, self._options, self._reward = seed, task["data"], 0.0

    def reset(self) -> dict[str, Any]:
        """Start with the seed of the task."""
        taken = inspect.signature(self._environment.reset).parameters
        open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values())
        given = {"seed": self._seed, **self._options}
        seen = awaited(
            self._environment.reset(**{k: v for k, v in given.items() if k in taken or open_ended})
        )
        return {"system": "", "user": seen_text(plain(seen))}

    def step(self, text: str, name: str, arguments: dict[str, Any] | None) -> dict[str, Any]:
        """Act; an action that the schema lets through may still be refused."""
        return self._moved(plain(awaited(self._environment.step(self._action(**(arguments or {}))))))

    def score(self) -> dict[str, Any]:
        """Return what the steps added up to."""
        return {"reward": self._reward, "metrics": {}}

    def close(self) -> None:
        """Let go of what the environment holds."""
        closing = getattr(self._environment, "close", None)
        if closing is not None:
            awaited(closing())

    def _moved(self, seen: dict[str, Any]) -> dict[str, Any]:
        reward = float(seen.get("reward") or 0.0)
        self._reward += reward
        return {"text": seen_text(seen), "role": "tool", "reward": reward, "done": bool(seen.get("done"))}


class RemoteOpenEnvEpisode(OpenEnvEpisode):
    """The same at a server, over a WebSocket of its own."""

    def __init__(self, client: Any, task: dict[str, Any], seed: int) -> None:
        super().__init__(client, None, task, seed)

    def reset(self) -> dict[str, Any]:
        """Connect, and start with the seed of the task."""
        awaited(self._environment.connect())
        result = awaited(self._environment.reset(**{"seed": self._seed, **self._options}))
        return {"system": "", "user": seen_text(plain(result.observation))}

    def step(self, text: str, name: str, arguments: dict[str, Any] | None) -> dict[str, Any]:
        """Send the action as it is."""
        result = awaited(self._environment.step(arguments or {}))
        return self._moved({**plain(result.observation), "reward": result.reward, "done": result.done})


def remote_schema(url: str) -> dict[str, Any]:
    """Return the schema of the actions that an OpenEnv server takes."""
    address = "http" + url[2:] if url.startswith("ws") else url
    try:
        with urlopen(f"{address.rstrip('/')}/schema", timeout=30) as answer:
            return dict(json.load(answer)["action"])
    except OSError as error:
        raise Refusal("entry", f"no server there tells its schema ({error})") from None


def plain(value: Any) -> dict[str, Any]:
    """Return an observation as a dictionary."""
    return dict(value.model_dump(mode="json")) if hasattr(value, "model_dump") else dict(value)


def seen_text(seen: Mapping[str, Any]) -> str:
    """Return an observation as text: its only field, or JSON without what is no observation."""
    shown = {k: v for k, v in seen.items() if k not in ("done", "reward", "metadata") and v is not None}
    values = list(shown.values())
    if len(values) == 1 and isinstance(values[0], str):
        return values[0]
    return json.dumps(shown, ensure_ascii=False, default=str)


ADAPTER = OpenEnv
