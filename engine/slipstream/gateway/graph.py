"""Floor 4. What an agent asked and the policy said, as a graph of token prefixes: what may be trained of it.

Agents do not speak in one line: clients repeat requests, histories are cut and summed up, sub-agents begin
conversations of their own. Each call of the policy is a node:

    tokens(call) = prompt + sampled
    parent(call) = the call whose tokens are the longest that the prompt begins with, if any

A path from a root to a leaf is one sample: its tokens are the leaf's, those that the path's calls sampled are
trained, each exactly as it was sampled, but for what a call takes out; what two paths share is trained in the
first of them. A call that was asked again with the same prompt and was then left alone is a retry: nobody
read its answer, so it ends no path.

Dimensions: P tokens of a prompt, S sampled ones, T tokens of a path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from slipstream.gateway.messages import Message, told_again
from slipstream.types import Completion, Float32Array, Int16Array, Int32Array, UInt8Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turn:
    """One call of the policy, answered."""

    index: int
    """Its place in the rollout's order of answers."""
    prompt_P: Int32Array
    completion: Completion
    conversation: tuple[Message, ...]
    """The request's messages and the answer; none for a raw prompt."""
    parent: Turn | None
    raw: str = ""
    """A raw prompt as the agent wrote it, if that was text."""
    untrained: tuple[slice, ...] = ()
    """Which of the sampled tokens are not trained."""

    @property
    def tokens_T(self) -> Int32Array:
        """Return prompt and sampled tokens."""
        return np.concatenate([self.prompt_P, self.completion.token_ids])

    @property
    def length(self) -> int:
        """Return how many tokens these are."""
        return len(self.prompt_P) + len(self.completion.token_ids)

    def path(self) -> list[Turn]:
        """Return the calls from the root to this one."""
        path, turn = [self], self.parent
        while turn is not None:
            path.append(turn)
            turn = turn.parent
        return path[::-1]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """A path from a root to a leaf, as a trajectory holds it; all [T]."""

    token_ids: Int32Array
    loss_mask: UInt8Array
    behavior_logprobs: Float32Array
    versions: Int32Array
    turns: Int16Array
    """Which of the rollout's trained calls sampled each token; -1 where none did."""
    calls: tuple[int, ...]
    """Indices of its calls."""
    trained: tuple[int, ...]
    """Those of them that no sample before it trains."""


@dataclass(slots=True)
class Graph:
    """All calls of one rollout.

    Example: ``graph.add(prompt, completion, conversation)``, then ``list(graph.samples())``.
    """

    turns: list[Turn] = field(default_factory=list)

    def add(
        self,
        prompt_P: Int32Array,
        completion: Completion,
        conversation: Sequence[Message],
        *,
        raw: str = "",
        untrained: Sequence[slice] = (),
    ) -> Turn:
        """Note an answered call and return it."""
        turn = Turn(
            index=len(self.turns),
            prompt_P=prompt_P,
            completion=completion,
            conversation=tuple(conversation),
            parent=self._parent_of(prompt_P),
            raw=raw,
            untrained=tuple(untrained),
        )
        self.turns.append(turn)
        return turn

    def latest_before(self, messages: Sequence[Message]) -> tuple[Turn | None, int]:
        """Return the call whose conversation goes furthest into `messages`, the latest of equals; how far.

        Its tokens are what the next prompt begins with: what was sampled is never tokenised again.
        """
        told = [(told_again(turn.conversation, messages), turn) for turn in self.turns if turn.conversation]
        count, turn = max(told, key=lambda one: (one[0], one[1].index), default=(0, None))
        return (turn, count) if count else (None, 0)

    def samplers(self, calls: Iterable[int]) -> tuple[tuple[str, int], ...]:
        """Return which servers sampled some calls, and under which serials."""
        found = (self.turns[index].completion.samplers for index in calls)
        return tuple(sorted(frozenset[tuple[str, int]]().union(*found)))

    def samples(self) -> Iterator[Sample]:
        """Yield each path from a root to a leaf, in the order of the leaves."""
        parents = {id(turn.parent) for turn in self.turns if turn.parent is not None}
        seen: set[int] = set()
        for turn in self.turns:
            if id(turn) not in parents and not self._is_retried(turn, parents):
                path = turn.path()
                fresh = [call.index for call in path if call.index not in seen]
                yield _sample(path, {index: len(seen) + place for place, index in enumerate(fresh)})
                seen.update(fresh)

    def _parent_of(self, prompt_P: Int32Array) -> Turn | None:
        begun = [
            turn
            for turn in self.turns
            if turn.length <= len(prompt_P) and np.array_equal(turn.tokens_T, prompt_P[: turn.length])
        ]
        return max(begun, key=lambda turn: (turn.length, turn.index), default=None)

    def _is_retried(self, leaf: Turn, parents: set[int]) -> bool:
        """Return whether the same prompt was asked again, and that answer was read or is the newer one."""
        return any(
            other is not leaf
            and np.array_equal(other.prompt_P, leaf.prompt_P)
            and (id(other) in parents or other.index > leaf.index)
            for other in self.turns
        )


def _sample(path: Sequence[Turn], numbers: Mapping[int, int]) -> Sample:
    """Return a path as a sample; `numbers` has those of its calls that are trained in it."""
    leaf = path[-1]
    count = leaf.length
    mask_T = np.zeros(count, dtype=np.uint8)
    logprobs_T = np.zeros(count, dtype=np.float32)
    versions_T = np.full(count, -1, dtype=np.int32)
    turns_T = np.full(count, -1, dtype=np.int16)
    for turn in path:
        if turn.index not in numbers:
            continue
        trained_S = np.ones(len(turn.completion.token_ids), dtype=bool)
        for span in turn.untrained:
            trained_S[span] = False
        places = len(turn.prompt_P) + np.flatnonzero(trained_S)
        mask_T[places], turns_T[places] = 1, numbers[turn.index]
        logprobs_T[places] = turn.completion.logprobs[trained_S]
        versions_T[places] = turn.completion.versions[trained_S]
    return Sample(
        token_ids=leaf.tokens_T.astype(np.int32),
        loss_mask=mask_T,
        behavior_logprobs=logprobs_T,
        versions=versions_T,
        turns=turns_T,
        calls=tuple(turn.index for turn in path),
        trained=tuple(numbers),
    )
