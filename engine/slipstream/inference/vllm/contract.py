"""Floor 4. The HTTP contract of vLLM 0.32 and 0.33, as far as it is used here; vLLM is not imported.

    POST /inference/v1/generate       token ids in, token ids out       needs `--enable-scale-out`
    GET  /v1/models
    POST /pause, /resume              the routes from here on           need VLLM_SERVER_DEV_MODE=1
    POST /init_weight_transfer_engine, /start_weight_update, /update_weights, /finish_weight_update
    POST /reset_prefix_cache, /collective_rpc        GET /get_world_size

A failure is one of

    InfrastructureError   nobody answers, the connection broke, HTTP 429 or 5xx: may be tried again
    DeadlineError         no answer in time: may be tried again
    ProtocolError         HTTP 4xx, or an answer of another form: would only fail again
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

import httpx2
import msgspec

from slipstream.deadlines import within
from slipstream.errors import InfrastructureError, ProtocolError
from slipstream.types import Sampling

T = TypeVar("T")
GENERATE: Final = "/inference/v1/generate"
SERVER_HEADER: Final = "x-slipstream-server"
"""In which a front names the life of the server that answered."""
_TOO_MANY: Final = 429
_SERVER_FAULT: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmDeadlines:
    """Longest waits for a server, in seconds."""

    generate_s: float = 300.0
    """One message: waiting in the server's queue, and through pauses, counts."""
    control_s: float = 60.0
    """Pause, resume, start, reset: the answer may wait for the step that runs."""
    update_s: float = 600.0
    """Handing all tensors over, and loading them."""


class Span(msgspec.Struct, frozen=True):
    """Sampled tokens `start` .. `end` - 1 of an answer come from the weights labelled `version`."""

    version: str
    start: int
    end: int


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token with its log-probability in nats."""

    token_id: int
    logprob: float


class _Logprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprob] | None = None


class _Choice(msgspec.Struct, frozen=True):
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    weight_versions: list[Span] | None = None


class _PromptLogprob(msgspec.Struct, frozen=True):
    logprob: float


class _Answer(msgspec.Struct, frozen=True):
    choices: list[_Choice]
    prompt_logprobs: list[dict[int, _PromptLogprob] | None] | None = None


class ServedModel(msgspec.Struct, frozen=True):
    """A model as a server lists it."""

    id: str
    root: str | None = None
    """Where its files are."""
    max_model_len: int | None = None


class _Models(msgspec.Struct, frozen=True):
    data: list[ServedModel]


class _Reset(msgspec.Struct, frozen=True):
    success: bool


class _Results(msgspec.Struct, frozen=True):
    results: list[Any]


class _WorldSize(msgspec.Struct, frozen=True):
    world_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What a server sampled for one request."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """One for each token, in nats, of the distribution it was drawn from."""
    spans: tuple[Span, ...]
    """In order, without gaps, over all tokens."""
    finish_reason: str
    """"stop", "length", or "abort": then the tokens are those sampled until then, perhaps none."""
    url: str
    """Who was asked."""
    server: str = ""
    """Which life of which server sampled it, where a front says so."""


class VllmClient:
    """One server's routes as functions.

    Example: ``async with VllmClient("http://127.0.0.1:8000") as client: await client.pause()``.
    """

    def __init__(
        self, base_url: str, *, model: str = "", key: str = "", deadlines: VllmDeadlines | None = None
    ) -> None:
        """Talk to the server at `base_url`, with a bearer `key` if it asks for one.

        Without `model` it uses the only one the server has.
        """
        self.base_url = base_url
        self.deadlines = deadlines or VllmDeadlines()
        self._model = model
        # A proxy from the environment is never between us; every wait has a deadline of its own.
        self._http = httpx2.AsyncClient(
            base_url=base_url,
            timeout=None,
            trust_env=False,
            headers={"authorization": f"Bearer {key}"} if key else {},
            # The server closes idle connections, and those it failed on, just when one may be used again.
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close all connections."""
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def generate(
        self, token_ids: Sequence[int], sampling: Sampling, *, stop_token: int, seed: int
    ) -> Generated:
        """Sample after the [T] tokens until the stop token, which is part of what is returned, or a limit."""
        parameters = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": seed,
            "stop_token_ids": [stop_token],
            # The stop token above decides alone, not what the model's files call the end.
            "ignore_eos": True,
            "logprobs": 0,
            "detokenize": False,
        }
        answer, server = await self._ask(token_ids, parameters)
        return _generated(answer.choices[0], self.base_url, server)

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Return the log-probabilities of tokens 1.. in nats, computed anew and not from cached prefixes."""
        answer, _ = await self._ask(
            token_ids, {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        )
        entries = answer.prompt_logprobs or []
        if len(entries) != len(token_ids):
            raise self._malformed(f"{len(token_ids)} prompt log-probabilities, got {len(entries)}")
        found = []
        for token, entry in zip(token_ids[1:], entries[1:], strict=True):
            if entry is None or token not in entry:
                raise self._malformed(f"a log-probability of prompt token {token}, got none")
            found.append(entry[token].logprob)
        return tuple(found)

    async def models(self) -> tuple[ServedModel, ...]:
        """Return what the server serves."""
        answer = await self._call("GET", "/v1/models", self.deadlines.control_s, _Models)
        return tuple(answer.data)

    async def world_size(self) -> int:
        """Return the number of worker processes that hold weights."""
        answer = await self._call("GET", "/get_world_size", self.deadlines.control_s, _WorldSize)
        return answer.world_size

    async def pause(self) -> None:
        """Freeze running requests and drop their keys and values.

        They are computed anew from the tokens after `resume`. Kept, they would make log-probabilities of
        neither the old weights nor the new.
        """
        await self._control("/pause", params={"mode": "keep", "clear_cache": "true"})

    async def resume(self) -> None:
        """Let frozen requests go on."""
        await self._control("/resume")

    async def init_weight_transfer(self, init_info: Mapping[str, Any]) -> None:
        """Tell all workers how weights will come."""
        await self._control("/init_weight_transfer_engine", {"init_info": init_info})

    async def start_weight_update(self) -> None:
        """Begin an update."""
        await self._control("/start_weight_update")

    async def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """Hand tensors over; returns when all workers have them."""
        await self._control("/update_weights", {"update_info": update_info}, seconds=self.deadlines.update_s)

    async def finish_weight_update(self, version: str) -> None:
        """Load what was handed over; tokens sampled from now on are labelled `version`."""
        await self._control(
            "/finish_weight_update", {"weight_version": version}, seconds=self.deadlines.update_s
        )

    async def reset_prefix_cache(self) -> None:
        """Forget the keys and values of earlier prompts; raises InfrastructureError if some are in use."""
        answer = await self._call("POST", "/reset_prefix_cache", self.deadlines.control_s, _Reset)
        if not answer.success:
            raise InfrastructureError(f"{self.base_url}: its prefix cache is in use and was not reset")

    async def worker_call(self, method: str, **arguments: Any) -> list[Any]:
        """Call a method of every worker and return what they answer."""
        body = {"method": method, "kwargs": arguments, "timeout": self.deadlines.control_s}
        answer = await self._call("POST", "/collective_rpc", self.deadlines.control_s, _Results, body)
        return answer.results

    async def check_health(self) -> None:
        """Sample one token: an open port and `/health` say nothing about a dead engine."""
        await self._ask((0,), {"max_tokens": 1, "temperature": 0.0, "detokenize": False}, probe=True)

    async def _ask(
        self, token_ids: Sequence[int], parameters: dict[str, Any], *, probe: bool = False
    ) -> tuple[_Answer, str]:
        body: dict[str, Any] = {"token_ids": list(token_ids), "sampling_params": parameters}
        if self._model:
            body["model"] = self._model
        seconds = self.deadlines.control_s if probe else self.deadlines.generate_s
        response = await self._send("POST", GENERATE, seconds, body)
        answer = self._decoded(response, GENERATE, _Answer)
        if len(answer.choices) != 1:
            raise self._malformed(f"one choice, got {len(answer.choices)}")
        return answer, response.headers.get(SERVER_HEADER, "")

    async def _control(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        params: Mapping[str, str] | None = None,
        seconds: float | None = None,
    ) -> None:
        await self._send("POST", path, seconds or self.deadlines.control_s, body, params)

    async def _call(
        self, method: str, path: str, seconds: float, form: type[T], body: Mapping[str, Any] | None = None
    ) -> T:
        return self._decoded(await self._send(method, path, seconds, body), path, form)

    def _decoded(self, response: httpx2.Response, path: str, form: type[T]) -> T:
        try:
            return msgspec.json.decode(response.content, type=form, strict=False)
        except msgspec.MsgspecError as error:
            raise self._malformed(f"an answer of {path} as documented, got another: {error}") from None

    async def _send(
        self,
        method: str,
        path: str,
        seconds: float,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> httpx2.Response:
        request = self._http.request(method, path, json=body, params=params)
        try:
            response = await within(request, seconds, "vllm client", f"{path} of {self.base_url}")
        except httpx2.HTTPError as error:
            raise InfrastructureError(
                f"{self.base_url}{path}: {type(error).__name__}: {error or 'the connection broke'}"
            ) from error
        status = response.status_code
        if status == _TOO_MANY or status >= _SERVER_FAULT:
            raise InfrastructureError(f"{self.base_url}{path}: HTTP {status}: {_reason(response)}")
        if not response.is_success:
            raise ProtocolError(f"{self.base_url}{path}: HTTP {status}: {_reason(response)}")
        return response

    def _malformed(self, expected: str) -> ProtocolError:
        return ProtocolError(f"{self.base_url}: expected {expected}")


def _reason(response: httpx2.Response) -> str:
    """Return the beginning of what a server says about its failure."""
    return " ".join(response.text.split())[:300] or "no reason given"


def _generated(choice: _Choice, url: str, server: str) -> Generated:
    """Check an answer against itself: a log-probability and a version for each token."""
    tokens = choice.token_ids or []
    entries = (choice.logprobs.content if choice.logprobs else None) or []
    if [entry.token_id for entry in entries] != tokens:
        raise ProtocolError(
            f"{url}: expected a log-probability of each of {len(tokens)} tokens, got {len(entries)}"
        )
    spans = choice.weight_versions or []
    ends = [0, *(span.end for span in spans)]
    follow = all(span.start == end < span.end for span, end in zip(spans, ends, strict=False))
    if not follow or ends[-1] != len(tokens):
        raise ProtocolError(f"{url}: expected versions of all {len(tokens)} tokens in order, got {spans}")
    if choice.finish_reason not in ("stop", "length", "abort"):
        raise ProtocolError(f"{url}: expected stop, length or abort, got {choice.finish_reason!r}")
    return Generated(
        token_ids=tuple(tokens),
        logprobs=tuple(entry.logprob for entry in entries),
        spans=tuple(spans),
        finish_reason=choice.finish_reason,
        url=url,
        server=server,
    )
