"""Floor 5. One episode as the page shows it: messages, tokens, calls, reward parts; plain data.

Dimensions: T tokens of the episode, W those of the window that is asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any, Final

import numpy as np

from slipstream.errors import ProtocolError
from slipstream.staleness import VersionTable
from slipstream.types import Float32Array, Int32Array, Trajectory
from slipstream.viewing.tokens import TokenTexts

WINDOW: Final = 4096
"""Tokens shown at once; the page asks for more."""
_ARGUMENT_CHARS: Final = 20_000
"""Most characters shown of the arguments of one call."""
_ROLE_TOKENS: Final = 8
"""Among so many first tokens of a message the template says whose it is."""


def describe_episode(
    trajectory: Trajectory,
    texts: TokenTexts,
    versions: VersionTable,
    *,
    start: int = 0,
    window: int = WINDOW,
    gap_T: Float32Array | None = None,
) -> dict[str, Any]:
    """Return an episode with the tokens from `start` on; `gap_T` is what gap.py gives."""
    total = len(trajectory.token_ids)
    start = min(max(0, start), total)
    shown = slice(start, min(start + window, total))
    return {
        "identity": asdict(trajectory.identity),
        "attempt": asdict(trajectory.attempt),
        "split": str(trajectory.split),
        "evaluation": trajectory.evaluation,
        "issue": trajectory.issue,
        "outcome": str(trajectory.outcome),
        "success": trajectory.success,
        "note": trajectory.note,
        "sampling": asdict(trajectory.sampling),
        "timings": asdict(trajectory.timings),
        "samplers": [list(pair) for pair in trajectory.samplers],
        "segments": list(trajectory.segments),
        "scores": [{**asdict(score), "kind": str(score.kind)} for score in trajectory.scores],
        "reward": float(trajectory.turn_rewards.sum(dtype=np.float64)),
        "turn_rewards": trajectory.turn_rewards.tolist(),
        "calls": [_call(call) for call in trajectory.tool_calls],
        "messages": messages(trajectory, texts),
        "steps": _steps(versions, np.unique(trajectory.versions).tolist()),
        "total": total,
        "start": start,
        "tokens": {
            "id": trajectory.token_ids[shown].tolist(),
            "text": texts.pieces(trajectory, shown),
            "control": [int(token in texts.control) for token in trajectory.token_ids[shown].tolist()],
            "mask": trajectory.loss_mask[shown].tolist(),
            "logprob": _rounded(trajectory.behavior_logprobs[shown]),
            "serial": trajectory.versions[shown].tolist(),
            "turn": trajectory.turns[shown].tolist(),
            "gap": None if gap_T is None else _rounded(gap_T[shown]),
        },
    }


def messages(trajectory: Trajectory, texts: TokenTexts) -> list[dict[str, Any]]:
    """Return who says which stretch of the tokens: prompt, policy, tool or user.

    What stands between two messages of the policy is the answer to the first of them, unless a segment
    begins: then it is a prompt again.
    """
    turn_T, calls = trajectory.turns, {call.turn for call in trajectory.tool_calls}
    cuts = np.flatnonzero(np.diff(turn_T)) + 1
    edges = sorted({0, len(turn_T), *cuts.tolist(), *trajectory.segments})
    parts: list[dict[str, Any]] = []
    turn = -1
    for start, end in pairwise(edges):
        if start == end:
            continue
        fresh = start == 0 or start in trajectory.segments
        if turn_T[start] >= 0:
            turn, role = int(turn_T[start]), "policy"
        elif fresh or turn < 0:
            role = "prompt"
        else:
            role = "tool" if turn in calls or not _is_user(trajectory.token_ids[start:end], texts) else "user"
        parts.append({"role": role, "start": start, "end": end, "turn": turn, "segment": fresh and start > 0})
    return parts


def _is_user(token_ids: Int32Array, texts: TokenTexts) -> bool:
    """Return whether the template's own words at the beginning of a message name a user, and no tool."""
    head = token_ids[:_ROLE_TOKENS].tolist()
    places = [place for place, token in enumerate(head) if token in texts.control]
    # The name is the control token itself, as in <|user|>, or stands behind it, as in <|im_start|>user.
    named = "".join(texts.text(token_ids[place : place + 2]) for place in places).lower()
    return "user" in named and "tool" not in named


def _call(call: Any) -> dict[str, Any]:
    plain = {**asdict(call), "status": str(call.status)}
    text = repr_json(plain.pop("arguments"))
    cut = len(text) - _ARGUMENT_CHARS
    plain["arguments"] = text if cut <= 0 else f"{text[:_ARGUMENT_CHARS]} … {cut:,} characters more"
    return plain


def repr_json(value: Any) -> str:
    """Return plain data as JSON text, indented, in its own letters."""
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)


def _steps(versions: VersionTable, serials: Sequence[int]) -> dict[int, int]:
    """Return serial -> the optimizer step that made its weights, of those that are known."""
    steps: dict[int, int] = {}
    for serial in serials:
        try:
            steps[serial] = versions[serial].step
        except ProtocolError:
            continue
    return steps


def _rounded(values: Float32Array) -> list[float | None]:
    return [round(value, 4) if math.isfinite(value) else None for value in values.tolist()]
