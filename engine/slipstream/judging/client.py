"""Floor 4. One answer of a server with OpenAI's chat completions.

What may pass (no connection, 429, 5xx) is an InfrastructureError; what will not is Unjudged. With `gateway`
each answer has a rollout of its own, as `slipstream gateway` wants it: opened, asked once, finished.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final, TypeVar

import httpx2
import msgspec

from slipstream.errors import ConfigurationError, InfrastructureError
from slipstream.judging.answers import Fault, Unjudged

T = TypeVar("T")
ANSWER_TOKENS: Final = 512
MOST_BYTES: Final = 1 << 20
_TOO_MANY: Final = 429
_SERVER_FAULT: Final = 500
_SHOWN: Final = 120
_HERE: Final = frozenset({"127.0.0.1", "::1", "localhost"})


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message


class _Answer(msgspec.Struct):
    choices: list[_Choice]


class _Rollout(msgspec.Struct):
    api_key: str


class Client:
    """A server and one model of it.

    Example: ``await Client("http://127.0.0.1:8000/v1", "judge").complete(messages)``.
    """

    def __init__(self, base_url: str, model: str, *, api_key: str = "", gateway: bool = False) -> None:
        """Connect to nothing yet; raises ConfigurationError for what is no address or no key."""
        try:
            url = httpx2.URL(base_url)
        except httpx2.InvalidURL:
            url = httpx2.URL()
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigurationError(
                f"judge: base_url must be such as http://127.0.0.1:8000/v1, got {base_url!r}"
            )
        if not (api_key.isascii() and api_key.isprintable()):
            raise ConfigurationError("judge: api_key must be printable ASCII")
        self._base_url, self._model = base_url.rstrip("/"), model
        self._key, self._gateway = api_key, gateway
        # A proxy from the environment leads to the world, and never to this machine.
        self._is_elsewhere = url.host not in _HERE

    async def complete(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return what the model says, sampled greedily.

        Its caller has the deadline. Raises InfrastructureError for what may pass, Unjudged for what will not.
        """
        body = {"model": self._model, "messages": messages, "temperature": 0.0, "max_tokens": ANSWER_TOKENS}
        # A client of its own for each answer: it is used from several event loops, one after another.
        async with httpx2.AsyncClient(
            timeout=None, trust_env=self._is_elsewhere, verify=_certificates()
        ) as http:
            key = self._key
            if self._gateway:
                key = (await self._post(http, "/rollouts", {}, key, _Rollout)).api_key
            answer = await self._post(http, "/chat/completions", body, key, _Answer)
            if self._gateway:
                await self._post(http, f"/rollouts/{key}/finish", {}, key, dict[str, Any])
        if not answer.choices:
            raise Unjudged(Fault.NONSENSE, f"{self._base_url} answered without a choice")
        return answer.choices[0].message.content or ""

    async def _post(
        self, http: httpx2.AsyncClient, path: str, body: Mapping[str, Any], key: str, form: type[T]
    ) -> T:
        url, data = f"{self._base_url}{path}", bytearray()
        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            async with http.stream("POST", url, json=body, headers=headers) as response:
                async for chunk in response.aiter_bytes():
                    data += chunk
                    if len(data) > MOST_BYTES:
                        raise Unjudged(Fault.NONSENSE, f"{url} answered with more than {MOST_BYTES} bytes")
        except httpx2.HTTPError as error:
            raise InfrastructureError(
                f"{url}: {type(error).__name__}: {error or 'the connection broke'}"
            ) from None
        status = response.status_code
        said = " ".join(data.decode("utf-8", "replace").split())[:_SHOWN] or "no reason given"
        if status == _TOO_MANY or status >= _SERVER_FAULT:
            raise InfrastructureError(f"{url}: HTTP {status}: {said}")
        if not response.is_success:
            raise Unjudged(Fault.REFUSED, f"{url}: HTTP {status}: {said}")
        try:
            return msgspec.json.decode(bytes(data), type=form)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise Unjudged(
                Fault.NONSENSE, f"{url}: expected an answer of OpenAI's form, got {said}"
            ) from None


@cache
def _certificates() -> ssl.SSLContext:
    """Return the roots of trust, which take longer to read than most answers."""
    return httpx2.create_ssl_context()
