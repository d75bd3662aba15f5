"""Floor 4. Raw prompts: text or tokens that an agent has put together itself, template and all.

A prompt that goes on from an earlier one keeps its tokens, and of those that were sampled behind it as many
as it repeats; only what is left is tokenised. So an agent that writes prompt + answer + more is trained on
what was sampled, whether it repeats the stop token, the text that stopped the answer, or neither.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from slipstream.chat import HALF_A_CHARACTER, Chat
from slipstream.gateway.graph import Graph
from slipstream.gateway.messages import RequestError
from slipstream.types import Completion, Int32Array

RawPrompt = str | tuple[int, ...]
_MOST_STOPS: Final = 4


def read_prompt(given: Any) -> RawPrompt:
    """Return the one prompt of a request, text or tokens; raises RequestError."""
    one = given
    if isinstance(given, list) and given and not _is_tokens(given):
        if len(given) > 1:
            raise RequestError(f"prompt: expected one prompt, got {len(given)}; ask for each by itself")
        (one,) = given
    if isinstance(one, str) and one:
        return one
    if isinstance(one, list) and one and _is_tokens(one):
        return tuple(one)
    raise RequestError(f"prompt: expected text or a list of token ids, not empty, got {given!r:.60}")


def read_stops(given: Any, name: str) -> tuple[str, ...]:
    """Return the texts at which an answer ends; raises RequestError."""
    stops = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise RequestError(f"{name}: expected text or a list of texts, none empty, got {given!r:.60}")
    if len(stops) > _MOST_STOPS:
        raise RequestError(f"{name}: expected at most {_MOST_STOPS} texts, got {len(stops)}")
    return tuple(stops)


def prompt_tokens(
    prompt: RawPrompt, graph: Graph, chat: Chat, *, redact: Callable[[str], str] = str
) -> Int32Array:
    """Return a prompt's tokens; raises RequestError for one that the model does not know.

    Secrets are taken out by `redact`.
    """
    if isinstance(prompt, str):
        known_K, rest = _longest_known(prompt, graph, chat)
        return np.concatenate([known_K, chat.encode(redact(rest))])
    strange = next((token for token in prompt if not 0 <= token < chat.vocabulary), None)
    if strange is not None:
        raise RequestError(f"prompt: expected token ids from 0 to {chat.vocabulary - 1}, got {strange}")
    tokens_P = np.array(prompt, dtype=np.int32)
    text = chat.decode(tokens_P)
    shown = redact(text)
    return tokens_P if shown == text else chat.encode(shown)


def cut(completion: Completion, stops: Sequence[str], chat: Chat) -> tuple[Completion, str, str]:
    """Return what was sampled up to the first of `stops`, its text before that, and which it was, or "".

    The token that completes the text is the last one: what follows is as if it had never been sampled.
    """
    sampled = completion.token_ids

    def stopped(count: int) -> bool:
        text = chat.text(sampled[:count])
        return any(stop in text for stop in stops)

    if not stopped(len(sampled)):
        return completion, chat.text(sampled), ""
    count = bisect_left(range(len(sampled)), True, key=stopped)
    text = chat.text(sampled[:count])
    kept = replace(
        completion,
        token_ids=sampled[:count],
        logprobs=completion.logprobs[:count],
        versions=completion.versions[:count],
        stopped=False,
    )
    at, stop = min((text.index(stop), stop) for stop in stops if stop in text)
    return kept, text[:at], stop


def _longest_known(prompt: str, graph: Graph, chat: Chat) -> tuple[Int32Array, str]:
    """Return the tokens of the earlier call that goes furthest into a prompt, and the text behind them."""
    known_K, rest = np.zeros(0, dtype=np.int32), prompt
    for turn in graph.turns:
        if turn.raw and prompt.startswith(turn.raw):
            behind, sampled = prompt[len(turn.raw) :], turn.completion.token_ids
            repeated = sampled[: _repeated(behind, sampled, chat)]
            left = behind[len(chat.decode(repeated)) :]
            if len(left) <= len(rest):
                known_K, rest = np.concatenate([turn.prompt_P, repeated]), left
    return known_K, rest


def _repeated(text: str, sampled: Int32Array, chat: Chat) -> int:
    """Return how many of the sampled tokens a text begins with."""

    def differs(count: int) -> bool:
        return not text.startswith(chat.decode(sampled[:count]).rstrip(HALF_A_CHARACTER))

    count = bisect_left(range(len(sampled) + 1), True, key=differs) - 1
    while not text.startswith(chat.decode(sampled[:count])):
        count -= 1
    return count


def _is_tokens(given: list[Any]) -> bool:
    return all(isinstance(token, int) and not isinstance(token, bool) for token in given)
