"""Floor 5. A judge against the programmatic verifier, over the episodes that a run recorded.

Each episode whose outcomes were judged is judged once more, by a rubric. A verdict speaks for success when
it is worth more than the middle of the rubric's least and highest value. What the judge could not judge is
counted apart and is in neither accuracy nor kappa (judging/agreement.py).
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from slipstream import recorded as at_rest
from slipstream.errors import FrameError, RunFolderError
from slipstream.judging.agreement import Agreement, agreement
from slipstream.judging.answers import Unjudged, Verdict
from slipstream.judging.judge import Judge
from slipstream.judging.prompts import transcript
from slipstream.judging.rubric import Rubric
from slipstream.run_folder import read_config
from slipstream.types import ScoreKind, Trajectory
from slipstream.viewing.episode import messages
from slipstream.viewing.tokens import TokenTexts, tokenizer_in
from slipstream.wire import decode_trajectory, inspect_trajectory

AT_ONCE: Final = 8
_INVALID: Final = "invalid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One episode with its outcome and what the judge said, or why it said nothing."""

    name: str
    """actor/epoch/number"""
    success: bool
    verdict: Verdict | Unjudged


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a judge made of some episodes."""

    rubric: Rubric
    judged: Sequence[Judged]

    def agreement(self) -> Agreement:
        """Return accuracy and kappa over the episodes that have a verdict."""
        return agreement(
            [
                (one.success, self.rubric.passes(one.verdict.choice))
                for one in self.judged
                if isinstance(one.verdict, Verdict)
            ]
        )

    def table(self) -> dict[tuple[bool, str], int]:
        """Return how many episodes have each (success, verdict), "invalid" among the verdicts."""
        return Counter(
            (one.success, one.verdict.choice if isinstance(one.verdict, Verdict) else _INVALID)
            for one in self.judged
        )

    def faults(self) -> dict[str, int]:
        """Return how many episodes have no verdict, by what went wrong."""
        return Counter(str(one.verdict.fault) for one in self.judged if isinstance(one.verdict, Unjudged))

    def invalid_share(self) -> float:
        """Return the share of episodes without a verdict."""
        return sum(self.faults().values()) / len(self.judged)

    def disagreements(self) -> list[Judged]:
        """Return the episodes whose verdict is not their outcome."""
        return [
            one
            for one in self.judged
            if isinstance(one.verdict, Verdict) and self.rubric.passes(one.verdict.choice) != one.success
        ]

    def holds(self, *, kappa: float, most_invalid: float) -> bool:
        """Return whether kappa is defined and at least so high, and no larger share is invalid."""
        found = self.agreement().kappa
        return found is not None and found >= kappa and self.invalid_share() <= most_invalid


def calibrate(folder: Path, judge: Judge, *, episodes: int) -> Calibration:
    """Judge the newest recorded episodes, at most so many, AT_ONCE at a time.

    Raises RunFolderError for a folder that has none with a judged outcome, or no tokenizer.
    """
    texts, textless = tokenizer_in(folder, read_config(folder).model.path)
    if textless:
        raise RunFolderError(f"{folder}: its episodes cannot be told as text: {textless}")
    found = _newest(folder, episodes)
    if not found:
        raise RunFolderError(f"{folder} holds no episode with a judged outcome; there is nothing to judge by")
    # Two episodes may begin alike and differ in nothing a judge sees: then the verdicts are one.
    return asyncio.run(_calibrated(judge, found, texts))


async def _calibrated(
    judge: Judge, found: Sequence[tuple[at_rest.Stored, Trajectory]], texts: TokenTexts
) -> Calibration:
    judged: dict[int, Judged] = {}
    left = iter(enumerate(found))

    async def work() -> None:
        for place, (one, trajectory) in left:
            verdict: Verdict | Unjudged
            try:
                verdict = await judge.verdict(told(trajectory, texts))
            except Unjudged as error:
                verdict = error
            judged[place] = Judged(name=one.name, success=one.success, verdict=verdict)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(work())
    return Calibration(rubric=judge.rubric, judged=[judged[place] for place in range(len(found))])


def told(trajectory: Trajectory, texts: TokenTexts) -> str:
    """Return a recorded episode as a judge is shown it: who says what, template included."""
    return transcript(
        {"role": part["role"], "content": texts.text(trajectory.token_ids[part["start"] : part["end"]])}
        for part in messages(trajectory, texts)
    )


def _newest(folder: Path, episodes: int) -> list[tuple[at_rest.Stored, Trajectory]]:
    newest: deque[at_rest.Stored] = deque(maxlen=episodes)
    for one in at_rest.stored(folder):
        scores = inspect_trajectory(one.record).header.scores
        outcomes = [score.value for score in scores if score.kind is ScoreKind.OUTCOME]
        if outcomes and None not in outcomes:
            newest.append(one)
    try:
        return [(one, decode_trajectory(one.record)) for one in newest]
    except FrameError as error:
        raise RunFolderError(f"{folder}: an episode cannot be read: {error}") from None


def report(calibration: Calibration) -> str:
    """Return a calibration as lines: the confusion table, the figures, then each disagreement."""
    table, faults = calibration.table(), calibration.faults()
    columns = [*calibration.rubric.choices, _INVALID]
    widths = [max(len(column), 7) for column in columns]
    lines = [" " * 7 + "".join(f"  {c:>{width}}" for c, width in zip(columns, widths, strict=True))]
    for success, name in ((True, "success"), (False, "failure")):
        counts = [table.get((success, column), 0) for column in columns]
        lines.append(name + "".join(f"  {n:>{width}}" for n, width in zip(counts, widths, strict=True)))
    found = calibration.agreement()
    accuracy = "none" if found.accuracy is None else f"{found.accuracy:.3f}"
    kappa = "not defined" if found.kappa is None else f"{found.kappa:.3f}"
    why = ", ".join(f"{fault} {count}" for fault, count in sorted(faults.items()))
    lines.append(
        f"accuracy {accuracy}, Cohen's kappa {kappa}, of {found.count}; "
        f"invalid {calibration.invalid_share():.3f}{f' ({why})' if why else ''}"
    )
    for one in calibration.disagreements():
        assert isinstance(one.verdict, Verdict)
        outcome = "success" if one.success else "failure"
        lines.append(f"{one.name}: {outcome}, judged {one.verdict.choice}: {one.verdict.reason}")
    return "\n".join([*lines, ""])
