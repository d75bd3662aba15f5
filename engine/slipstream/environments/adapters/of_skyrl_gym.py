"""Floor 4. Environments of skyrl-gym, in its interpreter: `init(prompt)`, `step(text)`."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from slipstream.environments.adapters.worker import Adapter, Refusal, attribute, numbers


class SkyRLGym(Adapter):
    """`init(prompt)`, `step(text)`: text in, messages out."""

    package, distribution, converses = "skyrl_gym", "skyrl-gym", True

    def __init__(self, entry: str, arguments: dict[str, Any]) -> None:
        super().__init__(entry, arguments)
        self.config = arguments
        if importlib.util.find_spec("omegaconf"):
            self.config = importlib.import_module("omegaconf").DictConfig(arguments)
        self.made = attribute(entry) if ":" in entry else None
        known = sorted(self.module.registry)
        if self.made is None and entry not in known:
            raise Refusal("entry", f"no environment {entry} among {', '.join(known)}")

    def episode(self, task: dict[str, Any], seed: int) -> Any:
        """Return an episode of a row: its question is the prompt, its other keys are the extras."""
        options = {"env_config": self.config, "extras": task["data"]}
        made = self.made(**options) if self.made else self.module.make(self.entry, **options)
        return SkyRLEpisode(made, task["question"])


class SkyRLEpisode:
    """One episode; its reward is the sum of its steps'."""

    def __init__(self, environment: Any, question: str) -> None:
        self._environment, self._question, self._reward = environment, question, 0.0

    def reset(self) -> dict[str, Any]:
        """Show the environment the prompt; it may return another."""
        prompt, _ = self._environment.init([{"role": "user", "content": self._question}])
        system = [each for each in prompt if each.get("role") == "system"]
        return {"system": said(system), "user": said([each for each in prompt if each not in system])}

    def step(self, text: str, name: str, arguments: dict[str, Any] | None) -> dict[str, Any]:
        """Hand the message on as it was sampled."""
        moved = self._environment.step(text)
        seen = moved["observations"]
        self._reward += float(moved["reward"])
        role = "user" if seen and seen[-1].get("role") == "user" else "tool"
        return {"text": said(seen), "role": role, "reward": float(moved["reward"]), "done": moved["done"]}

    def score(self) -> dict[str, Any]:
        """Return what the steps added up to."""
        return {"reward": self._reward, "metrics": numbers(self._environment.get_metrics())}

    def close(self) -> None:
        """Let go of what the environment holds."""
        self._environment.close()


def said(messages: Any) -> str:
    """Return the text of messages in OpenAI's form."""
    if isinstance(messages, str):
        return messages
    return "\n".join(str(each.get("content", "")) for each in messages)


ADAPTER = SkyRLGym
