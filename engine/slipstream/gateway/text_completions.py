"""Floor 4. OpenAI's completions: a raw prompt in, text out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, Final

from slipstream.gateway.completions import DONE, ChatCompletions, model_of, most_tokens, single, wants_usage
from slipstream.gateway.dialect import Asked, event
from slipstream.gateway.messages import RequestError
from slipstream.gateway.prompts import read_prompt, read_stops
from slipstream.gateway.rollouts import Answered, Rollout

_DEFAULT_TOKENS: Final = 16
"""OpenAI's own."""
_WITHOUT: Final = ("echo", "suffix")


class TextCompletions(ChatCompletions):
    """POST /v1/completions; beside OpenAI's fields the answer tells its tokens and weights."""

    path = "/v1/completions"

    def read(self, given: Any, rollout: Rollout) -> Asked:
        """Return what is asked for; raises RequestError."""
        model = model_of(given)
        for name in ("n", "best_of"):
            single(given, name)
        for name in _WITHOUT:
            if given.get(name):
                raise RequestError(f"{name}: expected nothing, got {given[name]!r:.60}; it is not done here")
        most = given.get("max_tokens")
        return Asked(
            model=model,
            prompt=read_prompt(given.get("prompt")),
            max_tokens=_DEFAULT_TOKENS if most is None else most_tokens(most, "max_tokens"),
            stops=read_stops(given.get("stop"), "stop"),
            stream=bool(given.get("stream")),
            options={"usage": wants_usage(given), "logprobs": _logprobs(given.get("logprobs"))},
        )

    def body(self, asked: Asked, answered: Answered, key: str) -> dict[str, Any]:
        """Return the answer."""
        turn, completion = answered.turn, answered.turn.completion
        sampled, prompt = len(completion.token_ids), len(turn.prompt_P)
        choice = {
            "index": 0,
            "text": answered.answer.text,
            "finish_reason": "stop" if completion.stopped or answered.cut else "length",
            "logprobs": _shown(answered) if asked.options["logprobs"] else None,
            "token_ids": completion.token_ids.tolist(),
            "prompt_token_ids": turn.prompt_P.tolist(),
        }
        return {
            "id": f"cmpl-{key}-{turn.index}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.model,
            "choices": [choice],
            "usage": {
                "prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled
            },
            "weight_versions": sorted({int(serial) for serial in completion.versions}),
        }  # fmt: skip

    def events(self, asked: Asked, body: Mapping[str, Any]) -> Iterator[str]:
        """Yield the answer as chunks."""
        (choice,) = body["choices"]
        shared = {key: body[key] for key in ("id", "object", "created", "model")}
        told = {key: choice[key] for key in ("index", "text", "logprobs")}
        yield event({**shared, "choices": [{**told, "finish_reason": None}]})
        ended = {**told, "text": "", "logprobs": None, "finish_reason": choice["finish_reason"]}
        yield event({**shared, "choices": [ended]})
        if asked.options["usage"]:
            yield event({**shared, "choices": [], "usage": body["usage"]})
        yield DONE


def _logprobs(given: Any) -> bool:
    """Return whether log-probabilities are wanted; raises RequestError for those of tokens not sampled."""
    if given not in (None, 0, 1) or isinstance(given, float):
        raise RequestError(f"logprobs: expected 0 or 1, got {given!r:.60}; only the sampled token's is known")
    return given is not None and given is not False


def _shown(answered: Answered) -> dict[str, Any]:
    """Return the log-probabilities at the temperature that was sampled at, in nats."""
    starts = list(accumulate(map(len, answered.pieces), initial=0))
    return {
        "tokens": list(answered.pieces),
        "token_logprobs": answered.turn.completion.logprobs.tolist(),
        "top_logprobs": None,
        "text_offset": starts[:-1],
    }
