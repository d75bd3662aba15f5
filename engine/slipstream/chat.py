"""Floor 3. Text and tokens: chat templates, and bridging between turns.

History is never tokenised again. A rollout's tokens grow by two kinds of appends only: what the policy
sampled (it ends with the stop token) and a *bridge*: the tokens the chat template puts between the
policy's stop token and its next message.

What users and tools say is text and nothing else: whatever it holds, no control token comes out of it, so
that no document can end a message or begin one. The template's words and a system message are trusted.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Final

import numpy as np
from jinja2.exceptions import TemplateError
from tokenizers import decoders
from transformers import PreTrainedTokenizerBase

from slipstream.call_formats import HERMES, CallFormat
from slipstream.errors import CheckpointError
from slipstream.interfaces import Observation, ToolSpec
from slipstream.tokenizer import CALL_TOKENS
from slipstream.types import Int32Array

PROBE, OTHER_PROBE = "probe-of-the-template", "another-probe"
"""Contents by which rendered messages are found again."""
HALF_A_CHARACTER: Final = "\ufffd"
"""What the last bytes decode to while the rest of their character is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A message of a conversation, calls written out in its text."""

    role: str
    """system, user, assistant or tool."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Text of one source."""

    text: str
    barred: frozenset[int] = frozenset()
    """Tokens that may not come out of it."""


class Chat:
    """Turns messages into tokens and sampled tokens into text, for one tokenizer.

    Example: ``Chat(tokenizer).bridge("no results")`` is ``<|tool|>no results<|end|><|assistant|>`` for
    the small policy.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        explain_calls: bool = False,
        calls: CallFormat = HERMES,
    ) -> None:
        """Write calls as `calls` does; with `explain_calls` the system message also describes how."""
        self._tokenizer = tokenizer
        self.calls = calls
        self._explain_calls = explain_calls
        self._encoder = tokenizer.backend_tokenizer
        self._control = _control_tokens(tokenizer)
        # A tokenizer that lacks them writes calls as ordinary text.
        known = (self._encoder.token_to_id(token) for token in CALL_TOKENS)
        self._call_tokens = frozenset(token for token in known if token is not None)
        self.stop_token = int(tokenizer.eos_token_id)
        self.vocabulary = len(tokenizer)
        """Tokens it knows, numbered from 0."""
        self._stop_text = str(tokenizer.eos_token)
        self._tool_role = "tool" if self._shows("user", "tool") else "user"
        self._system_role = self._shows("system", "user")
        self.bridge = lru_cache(maxsize=65536)(self._bridge)
        self._bridge_frame = lru_cache(maxsize=2)(self._find_bridge)
        self._frame = lru_cache(maxsize=4096)(self._roles_frame)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer whose chat template is spoken."""
        return self._tokenizer

    def prompt(
        self,
        observation: Observation,
        tools: Sequence[ToolSpec],
        *,
        schemas: bool = False,
        converses: bool = False,
    ) -> Int32Array:
        """Return the [T] tokens up to the policy's first message; tools are told as by `system_message`."""
        listed = self.system_message(tools, schemas=schemas, converses=converses) if tools else ""
        system = "\n".join(part for part in (observation.system, listed) if part)
        return self._prompt(system, observation.user)

    def system_message(
        self, tools: Sequence[ToolSpec], *, schemas: bool = False, converses: bool = False
    ) -> str:
        """Return the tool list, e.g. ``Tools: search(query), open(document), answer(text)``.

        schemas: a line for each tool instead, with its description and the JSON schema of its parameters;
        converses: whether a message may be plain text for a user.
        """
        if schemas:
            listed = "".join(f"\n{_described(tool)}" for tool in tools)
        else:
            named = (f"{tool.name}({', '.join(tool.parameters.get('properties', {}))})" for tool in tools)
            listed = f" {', '.join(named)}"
        if not self._explain_calls:
            return f"Tools:{listed}"
        syntax = self.calls.write("TOOL", {"ARGUMENT": "VALUE"})
        rule = "Each message calls exactly one tool, and is only this"
        if converses:
            rule = "Each message is text for the user, or calls exactly one tool and is then only this"
        return f"Tools:{listed}\n{rule}: {syntax}"

    def text(self, token_ids: Int32Array) -> str:
        """Decode sampled tokens, without the stop token."""
        kept = token_ids[:-1] if len(token_ids) and token_ids[-1] == self.stop_token else token_ids
        return self.decode(kept)

    def decode(self, token_ids: Int32Array) -> str:
        """Decode tokens as they stand, control tokens as they are spelled."""
        return str(self._encoder.decode(token_ids.tolist(), skip_special_tokens=False))

    def span(self, token_ids: Int32Array, start: int, end: int) -> slice:
        """Return which tokens hold the characters [start, end) of the text that they decode to."""

        def length(count: int) -> int:
            return len(self.decode(token_ids[:count]).rstrip(HALF_A_CHARACTER))

        counts = range(len(token_ids) + 1)
        first = bisect_right(counts, start, key=length) - 1
        return slice(first, bisect_left(counts, end, key=length))

    def encode(self, text: str) -> Int32Array:
        """Encode trusted text as it stands: what spells a control token becomes one."""
        return np.array(self._encoder.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def message(self, text: str) -> Int32Array:
        """Return the tokens of one assistant message as the policy would sample them, stop token included."""
        return np.append(self.encode(text), np.int32(self.stop_token))

    def conversation(self, messages: Sequence[Said], tools: Sequence[ToolSpec] = ()) -> Int32Array:
        """Return the [T] tokens of a whole conversation, up to where the policy goes on.

        Tools stand in the system message, in front of which one is put where there is none. Raises
        CheckpointError when the template leaves a message out.
        """
        said = list(messages)
        if tools and (not said or said[0].role != "system"):
            said.insert(0, Said(role="system", text=self.system_message(tools)))
        elif tools:
            said[0] = Said(role="system", text=f"{said[0].text}\n{self.system_message(tools)}".lstrip("\n"))
        return self._encode(self._pieces(said))

    def continuation(self, messages: Sequence[Said]) -> Int32Array:
        """Return the tokens from the policy's stop token to its next message, when these messages come then.

        Raises CheckpointError when the template does not end messages with that token.
        """
        said = [Said(role="user", text="?"), Said(role="assistant", text="!"), *messages]
        pieces = self._pieces(said)
        # Template, question, template, answer; behind it the stop token opens the rest.
        before_stop, stop, after = pieces[4].text.partition(self._stop_text)
        if not stop or before_stop.strip():
            raise self._no_stop()
        return self._encode([Piece(text=after), *pieces[5:]])

    def _pieces(self, said: Sequence[Said]) -> list[Piece]:
        """Return what the template puts around the messages, and their contents between, alternating."""
        frame = self._frame(tuple(one.role for one in said))
        barred = {"system": frozenset[int](), "assistant": self._control - self._call_tokens}
        pieces = [Piece(text=frame[0])]
        for one, behind in zip(said, frame[1:], strict=True):
            pieces += [
                Piece(text=one.text, barred=barred.get(one.role, self._control)), Piece(text=behind)
            ]  # fmt: skip
        return pieces

    def _roles_frame(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        """Return what the template puts before, between and behind messages of these roles.

        Each content is a probe of its own. Raises CheckpointError when one is left out.
        """
        shown = {"tool": self._tool_role, "system": "system" if self._system_role else "user"}
        messages = [
            {"role": shown.get(role, role), "content": _probe(number)} for number, role in enumerate(roles)
        ]
        rest, frame = self._render(messages, generate=True), list[str]()
        for number, role in enumerate(roles):
            before, found, rest = rest.partition(_probe(number))
            if not found:
                raise CheckpointError(
                    f"the chat template leaves out a message of role {role}; choose one that shows all"
                )
            frame.append(before)
        return (*frame, rest)

    def _prompt(self, system: str, user: str) -> Int32Array:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": PROBE}]
        if not self._system_role:
            messages = [{"role": "user", "content": f"{system}\n\n{PROBE}"}]
        before, after = _around(PROBE, self._render(messages, generate=True))
        return self._encode_between(before, user, after)

    def _bridge(self, result: str, role: str = "tool") -> Int32Array:
        """Return the tokens that follow the policy's stop token when a tool, or the user, says `result`."""
        before, after = self._bridge_frame(self._tool_role if role == "tool" else role)
        tokens = self._encode_between(before, result, after)
        tokens.setflags(write=False)
        return tokens

    def _find_bridge(self, role: str) -> tuple[str, str]:
        """Return what the template puts before and after what a role says behind the policy.

        It is read off a rendered conversation: what stands after the stop token of the message before.
        Raises CheckpointError when the template does not end messages with that token.
        """
        rendered = self._render(
            [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": PROBE},
                {"role": role, "content": OTHER_PROBE},
            ],
            generate=True,
        )
        _, _, after = rendered.partition(PROBE)
        before_stop, stop, bridge = after.partition(self._stop_text)
        if not stop or before_stop.strip():
            raise self._no_stop()
        return _around(OTHER_PROBE, bridge)

    def _no_stop(self) -> CheckpointError:
        return CheckpointError(
            f"the chat template does not end an assistant message with the tokenizer's eos_token "
            f"{self._stop_text!r}; set eos_token to the token that ends a message"
        )

    def _encode_between(self, before: str, content: str, after: str) -> Int32Array:
        """Encode a template's text with untrusted content in it."""
        return self._encode(
            [Piece(text=before), Piece(text=content, barred=self._control), Piece(text=after)]
        )

    def _encode(self, pieces: Sequence[Piece]) -> Int32Array:
        """Encode text of several sources; out of each comes no token that is barred from it.

        All is encoded as one, as the model has seen it in training, so ordinary content gives the tokens
        that it gives anywhere. Where a piece spells a barred token, the text is cut within it and the parts
        are encoded apart.
        """
        text = "".join(piece.text for piece in pieces)
        ends = list(accumulate(len(piece.text) for piece in pieces))
        barred = [
            (end - len(piece.text), end, piece.barred)
            for piece, end in zip(pieces, ends, strict=True)
            if piece.barred and piece.text
        ]
        cuts = {0, len(text)}
        while True:
            tokens: list[int] = []
            more: set[int] = set()
            for token, first, last in self._spans(text, sorted(cuts)):
                struck = [
                    (start, end) for start, end, tokens_barred in barred
                    if first < end and last > start and token in tokens_barred
                ]  # fmt: skip
                for start, end in struck:
                    more.update(cut for cut in (start, end, first + 1) if first < cut < last)
                if not struck:
                    tokens.append(token)
            if not more:
                return np.array(tokens, dtype=np.int32)
            cuts |= more

    def _spans(self, text: str, cuts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Encode the parts of a text one by one; yield each token with where it begins and ends."""
        for low, high in pairwise(cuts):
            encoded = self._encoder.encode(text[low:high], add_special_tokens=False)
            for token, (first, last) in zip(encoded.ids, encoded.offsets, strict=True):
                yield token, low + first, low + last

    def _render(self, messages: list[dict[str, str]], *, generate: bool) -> str:
        rendered: Any = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate
        )
        return str(rendered)

    def _shows(self, *roles: str) -> bool:
        """Tell whether the template shows messages of these roles; some drop one, some refuse it."""
        messages = [{"role": role, "content": f"{PROBE}{i}"} for i, role in enumerate(roles)]
        try:
            rendered = self._render(messages, generate=True)
        except (TemplateError, ValueError):
            return False
        return all(message["content"] in rendered for message in messages)


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of all tokens that text may not give; blanks and the unknown steer nothing.

    Where every byte has a token, as in byte-level BPE, nothing is unknown: what goes by that name is a
    control token put to a second use.
    """
    added = tokenizer.added_tokens_decoder.items()
    control = {number for number, token in added if token.special or not token.content.isspace()}
    byte_level = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
    return frozenset(control if byte_level else control - {tokenizer.unk_token_id})


def _described(tool: ToolSpec) -> str:
    described = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return json.dumps(described, ensure_ascii=False)


def _probe(number: int) -> str:
    return f"{PROBE}-{number:06d}"


def _around(probe: str, rendered: str) -> tuple[str, str]:
    """Return what a template put before and after a message's content."""
    before, found, after = rendered.rpartition(probe)
    if not found:
        raise CheckpointError("the chat template leaves messages out; choose one that shows all of them")
    return before, after
