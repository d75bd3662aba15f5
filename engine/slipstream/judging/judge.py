"""Floor 4. A judge: verdicts on episodes by a rubric, as a metric or a component of the reward.

    from slipstream import Judge, Rubric

    judge = Judge("http://127.0.0.1:8000/v1", "judge", Rubric(name="polite", criterion=..., choices=...))
    polite = environment(..., rewards=[right, judge.metric()])

The model behind it is whatever an OpenAI-compatible server serves, a frozen checkpoint behind `slipstream
gateway --greedy` too; nothing of it is trained. A judge that answers nonsense, or not in time, gives
`Invalid`: no score, counted as invalid/NAME. Verdicts are kept in SQLite by model, rubric and episode;
failures never are. A judge runs where scores are made: a sandbox without a network has none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from slipstream.authoring.episode import Episode
from slipstream.authoring.rewards import Function, Kind, Metric, Reward, reward
from slipstream.errors import ConfigurationError, InfrastructureError
from slipstream.extras import require
from slipstream.judging.answers import Fault, Unjudged, Verdict, read_answer
from slipstream.judging.prompts import MOST_CHARS, prompt, transcript
from slipstream.judging.rubric import Rubric
from slipstream.retries import Backoff, retried
from slipstream.tools.cache import ToolCache

_BACKOFF: Final = Backoff(first_s=0.5, longest_s=4.0)
_FITTING: Final[dict[Kind, tuple[Callable[[float], bool], str]]] = {
    "outcome": (lambda value: value in (0.0, 1.0), "0 or 1"),
    "shaping": (lambda value: 0.0 <= value <= 1.0, "from 0 to 1"),
    "penalty": (lambda value: value >= 0.0, "from 0 on"),
}


class Judge:
    """A model that judges by one rubric.

    Example: ``(await judge.verdict(transcript(episode.messages))).choice == "meets"``.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        rubric: Rubric,
        *,
        api_key: str = "",
        cache: str | Path | None = None,
        timeout_s: float = 20.0,
        retries: int = 2,
        version: str = "",
        gateway: bool = False,
        most_chars: int = MOST_CHARS,
    ) -> None:
        """Ask `model` at `base_url`, which ends with /v1 as OpenAI's does.

        cache      SQLite file that verdicts are kept in; None keeps none
        timeout_s  for one verdict, retries included: less than environment.timeout_s, within which all
                   scores of an episode are made
        retries    after failures of connection and server alone
        version    what `model` does not name, such as the checkpoint behind a gateway
        gateway    the server is `slipstream gateway --greedy`, where each answer has a rollout of its own and
                   the gateway's configuration bounds it: sampling.max_tokens, environment.max_tokens
        most_chars of an episode; what is longer loses its middle

        Raises ConfigurationError.
        """
        if not timeout_s > 0.0 or retries < 0 or most_chars < 1:
            raise ConfigurationError(
                "judge: timeout_s and most_chars must be positive and retries at least 0, got "
                f"{timeout_s:g}, {most_chars} and {retries}"
            )
        require("judge", "httpx2", by=f"judge {rubric.name}")
        from slipstream.judging.client import Client

        self.rubric, self.model = rubric, model
        self._client = Client(base_url, model, api_key=api_key, gateway=gateway)
        self._path = _usable(cache)
        self._opened: ToolCache | None = None
        self._timeout_s, self._retries = timeout_s, retries
        self._version, self._most_chars = version, most_chars

    async def verdict(self, episode: str) -> Verdict:
        """Return the verdict on an episode as text; raises Unjudged when there is none."""
        asked = prompt(self.rubric, episode)
        ends_at = asyncio.get_running_loop().time() + self._timeout_s

        async def compute() -> dict[str, str]:
            said = await retried(
                lambda _: self._client.complete(asked),
                retries=self._retries,
                backoff=_BACKOFF,
                until_s=ends_at,
            )
            found = read_answer(said, self.rubric)
            return {"choice": found.choice, "reason": found.reason}

        try:
            async with asyncio.timeout_at(ends_at):
                # What the messages hold names rubric and episode; values of verdicts do not change them.
                kept, cached = await self._cache().call(self.model, self._version, asked, None, compute)
        except InfrastructureError as error:
            raise Unjudged(Fault.TRANSPORT, str(error)) from None
        except TimeoutError:
            raise Unjudged(Fault.TIMEOUT, f"no verdict within {self._timeout_s:g} s") from None
        choice = kept["choice"]
        value = float(self.rubric.choices[choice])
        return Verdict(choice=choice, value=value, reason=kept["reason"], cached=cached)

    async def value(self, episode: Episode) -> float:
        """Return what the verdict on a finished episode is worth; raises Unjudged, an `Invalid`."""
        text = transcript(episode.messages, most_chars=self._most_chars)
        return (await self.verdict(text)).value

    def metric(self, name: str = "") -> Metric:
        """Return the judge as a metric, called as its rubric unless named: shown and never trained on."""
        return Metric(name=name or self.rubric.name, function=self.value)

    def reward(
        self,
        weight: float = 1.0,
        *,
        kind: Kind = "outcome",
        gate: Reward | Function | None = None,
        name: str = "",
    ) -> Reward:
        """Return the judge as a component of the reward (authoring/rewards.py).

        Raises ConfigurationError for values that its kind does not take: an outcome is 0 or 1.
        """

        async def judged(episode: Episode) -> Any:
            return await self.value(episode)

        judged.__name__ = name or self.rubric.name
        made = reward(weight, kind=kind, gate=gate)(judged)
        fits, expected = _FITTING[kind]
        for choice, value in self.rubric.choices.items():
            if not fits(value):
                raise ConfigurationError(
                    f"rubric {self.rubric.name}: as {kind} its values must be {expected}, got "
                    f"choices.{choice} = {value:g}; mend them, or use judge.metric()"
                )
        return made

    def close(self) -> None:
        """Close the file of verdicts."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _cache(self) -> ToolCache:
        # Opened when it is used: a judge is made where an environment is defined, and SQLite bears no fork.
        if self._opened is None:
            self._opened = ToolCache("judge", self._path)
        return self._opened


def _usable(path: str | Path | None) -> Path | None:
    """Return the absolute path of a file of verdicts, its folder made; raises ConfigurationError."""
    if path is None:
        return None
    file = Path(path).absolute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"judge: cache {file} cannot be made: {error.strerror or error}") from None
    if file.is_dir():
        raise ConfigurationError(f"judge: cache must be a file, and {file} is a folder")
    return file
