"""Floor 4. `@reward`, `@metric`, `@monitor`: functions of a finished episode, and what they add up to.

    kind       the function returns                  worth
    outcome    true or false (1 or 0)                weight x (+1 or -1); weights of all outcomes add up to 1
    shaping    a number from 0 to 1                  weight x value; all together at most rewards.shaping
    penalty    how often or how much, from 0 on      -weight x value; all together at most rewards.penalty_cap

    returned or raised                       counts as
    Invalid("no reference answer")           no score: of an outcome, the episode leaves its group's baseline
    PolicyFault("answer is not a number")    0, the policy's own doing: a failed outcome, no shaping
    InfrastructureError, OSError             judged again, then an infrastructure failure (ground.py)
    any other exception, a wrong value       Invalid, and a traceback in the log

A component with a gate counts only where its gate holds, and as 0 elsewhere; an invalid gate makes it
invalid. So partial credit cannot be farmed: ``@reward(0.2, kind="shaping", gate=correct)``.

Outcomes dominate, or the environment is refused: with w the least weight of an outcome, turning a failure
into a success is worth 2 w, and 2 w - rewards.penalty_cap - rewards.shaping must be at least 0.1.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from slipstream.authoring.episode import Episode
from slipstream.config import RewardConfig
from slipstream.config_tasks import DOMINANCE_MARGIN
from slipstream.errors import ConfigurationError, InfrastructureError
from slipstream.foreign import Contained, settled
from slipstream.types import Score, ScoreKind

Function = Callable[[Episode], Any]
Kind = Literal["outcome", "shaping", "penalty"]
Action = Literal["log", "screen", "zero", "halt"]
KINDS: Final = ("outcome", "shaping", "penalty")
ACTIONS: Final = ("log", "screen", "zero", "halt")
MONITORS: Final = "fired/"
"""What names of monitors' scores begin with."""
_LONGEST_REASON: Final = 200
_LOGGED_EACH: Final = 3
"""Times that the log tells the same of a function; the rest are only counted."""
_told: Counter[tuple[str, str]] = Counter()

log = logging.getLogger(__name__)


class Invalid(Exception):
    """What a judging function returns or raises when it cannot judge; the message says why."""


class PolicyFault(Exception):
    """What a judging function raises when the policy's own output cannot be read: the value is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A component of the reward; calling it calls the function."""

    name: str
    function: Function
    weight: float
    kind: ScoreKind
    gate: Reward | Function | None = None

    def __call__(self, episode: Episode) -> Any:
        """Call the function itself."""
        return self.function(episode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A number that is shown and never trained on."""

    name: str
    function: Function

    def __call__(self, episode: Episode) -> Any:
        """Call the function itself."""
        return self.function(episode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Monitor:
    """Looks for what should not happen, and says what becomes of an episode in which it does."""

    name: str
    function: Function
    action: Action

    def __call__(self, episode: Episode) -> Any:
        """Call the function itself."""
        return self.function(episode)


Judge = Reward | Metric | Monitor


def reward(
    weight: float = 1.0, *, kind: Kind = "outcome", gate: Reward | Function | None = None
) -> Callable[[Function], Reward]:
    """Make a component of the reward of a function of the finished `Episode`, sync or async.

    gate: a reward of the same environment, or a function of the episode; the component counts where it holds.
    Raises ConfigurationError for a weight that is not positive, or an unknown kind.

    Example: ``@reward(1.0)`` above ``def correct(episode): return episode.answer == "4"``.
    """
    if kind not in KINDS:
        raise ConfigurationError(f"reward: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not (isinstance(weight, int | float) and 0.0 < weight < math.inf):
        raise ConfigurationError(
            f"reward: weight must be a positive number, also of a penalty, got {_spelled(weight)}"
        )

    def made(function: Function) -> Reward:
        return Reward(
            name=_named(function), function=function, weight=float(weight), kind=ScoreKind(kind), gate=gate
        )

    return made


def metric(function: Function) -> Metric:
    """Make a metric of a function of the finished `Episode`: shown as metric/NAME, its mean over a batch."""
    return Metric(name=_named(function), function=function)


def monitor(action: Action = "log") -> Callable[[Function], Monitor]:
    """Make a monitor of a function of the finished `Episode` that returns whether it fires, or a reason.

    log      counted and shown as fired/NAME, the share of episodes in which it fired; nothing else
    screen   the episode is not trained: its outcome is invalid, and it leaves its group's baseline
    zero     every outcome counts as failed, and shaping as 0
    halt     the run ends, and says why

    A monitor that fails itself does not fire, and is logged.

    Example: ``@monitor("zero")`` above ``def edits_tests(episode): return "tests/" in str(episode.calls)``.
    """
    if action not in ACTIONS:
        raise ConfigurationError(f"monitor: action must be one of {', '.join(ACTIONS)}, got {action!r}")

    def made(function: Function) -> Monitor:
        return Monitor(name=_named(function), function=function, action=action)

    return made


def check_judges(judges: Sequence[Judge], limits: RewardConfig) -> None:
    """Refuse judges under which an outcome could be outweighed, or that cannot be told apart."""
    seen: set[str] = set()
    for judge in judges:
        if not isinstance(judge, Reward | Metric | Monitor):
            raise ConfigurationError(
                f"rewards: expected what @reward, @metric or @monitor made, got {_spelled(judge)}"
            )
        if judge.name in seen or judge.name in ("step", "invalid"):
            raise ConfigurationError(f"rewards: the name {judge.name} is taken; rename that function")
        seen.add(judge.name)
    rewards = [judge for judge in judges if isinstance(judge, Reward)]
    for one in rewards:
        if isinstance(one.gate, Reward) and one.gate not in rewards:
            raise ConfigurationError(
                f"rewards: {one.name} is gated by {one.gate.name}, which is not among the rewards; add it"
            )
    _check_weights(rewards, limits)


def _check_weights(rewards: Sequence[Reward], limits: RewardConfig) -> None:
    def weights(kind: ScoreKind) -> list[float]:
        return [one.weight for one in rewards if one.kind is kind]

    outcomes = weights(ScoreKind.OUTCOME)
    if not math.isclose(sum(outcomes), 1.0, abs_tol=1e-6):
        raise ConfigurationError(
            "rewards: the weights of outcomes must add up to 1, so that a success is worth +1 and a failure "
            f"-1, got {sum(outcomes):g} of {len(outcomes)}"
        )
    for kind, key, most in (
        (ScoreKind.SHAPING, "rewards.shaping", limits.shaping),
        (ScoreKind.PENALTY, "rewards.penalty_cap", limits.penalty_cap),
    ):
        total = sum(weights(kind))
        if total > most + 1e-9:
            raise ConfigurationError(
                f"rewards: the weights of kind {kind} must add up to at most {key} = {most:g}, got "
                f"{total:g}; lower them, or set {key}={total:g}"
            )
    spread, gap = limits.penalty_cap + limits.shaping, 2.0 * min(outcomes)
    if gap - spread < DOMINANCE_MARGIN - 1e-9:
        raise ConfigurationError(
            f"rewards: an outcome of weight {min(outcomes):g} turns the reward by {gap:g}, which "
            f"rewards.penalty_cap + rewards.shaping = {spread:g} could outweigh; let them be at most "
            f"{max(0.0, gap - DOMINANCE_MARGIN):g}, or join outcomes into one"
        )


async def judged(judges: Sequence[Judge], episode: Episode) -> list[Score]:
    """Return the scores of a finished episode, monitors' actions carried out; raises as its ground does."""
    known: dict[str, float | Invalid] = {}
    scores = [await _score(one, episode, known) for one in judges if isinstance(one, Reward)]
    for one in judges:
        if isinstance(one, Metric):
            value = await _value(one, episode, _any_number)
            scores.append(_scored(one.name, ScoreKind.METRIC, 0.0, value))
    for one in judges:
        if isinstance(one, Monitor):
            reason = await _fired(one, episode)
            kind = ScoreKind.HALT if reason and one.action == "halt" else ScoreKind.MONITOR
            name, fired = f"{MONITORS}{one.name}", float(bool(reason))
            scores = [_after(one, reason, score) for score in scores]
            scores.append(Score(name=name, kind=kind, weight=0.0, value=fired, invalid=reason))
    return scores


def _after(one: Monitor, reason: str, score: Score) -> Score:
    """Return what a monitor leaves of a score."""
    outcome = score.kind is ScoreKind.OUTCOME
    if not reason or one.action in ("log", "halt") or not (outcome or score.kind is ScoreKind.SHAPING):
        return score
    if one.action == "screen":
        why = f"screened by {one.name}: {reason}"
        return _scored(score.name, score.kind, score.weight, Invalid(why)) if outcome else score
    return _scored(score.name, score.kind, score.weight, -1.0 if outcome else 0.0)


async def _score(one: Reward, episode: Episode, known: dict[str, float | Invalid]) -> Score:
    value = await _component(one, episode, known)
    if one.kind is ScoreKind.OUTCOME and not isinstance(value, Invalid):
        value = 2.0 * value - 1.0
    return _scored(one.name, one.kind, -one.weight if one.kind is ScoreKind.PENALTY else one.weight, value)


async def _component(one: Reward, episode: Episode, known: dict[str, float | Invalid]) -> float | Invalid:
    """Return a component's value, each function called once."""
    if one.name not in known:
        gate: float | Invalid = 1.0
        if isinstance(one.gate, Reward):
            gate = await _component(one.gate, episode, known)
        elif one.gate is not None:
            gate = await _value(Metric(name=_named(one.gate), function=one.gate), episode, _any_number)
        if isinstance(gate, Invalid):
            known[one.name] = Invalid(f"gate: {gate}")
        else:
            known[one.name] = await _value(one, episode, _READERS[one.kind]) if gate > 0.0 else 0.0
    return known[one.name]


async def _value(one: Reward | Metric, episode: Episode, read: Callable[[float], str]) -> float | Invalid:
    """Call a judging function; `read` says what is wrong with a number, or ""."""
    value: Any = None
    number = math.nan
    with Contained(InfrastructureError, OSError) as ran:
        value = await settled(one.function(episode))
        number = float(value) if hasattr(value, "__float__") else math.nan
    match ran.error:
        case PolicyFault():
            return 0.0
        case Invalid() as reason:
            return reason
        case Exception() as error:
            _tell(one.name, f"failed with {type(error).__name__}", error)
            return Invalid(f"{type(error).__name__}: {error}")
    if isinstance(value, Invalid):
        return value
    wrong = "a number" if not math.isfinite(number) else read(number)
    if wrong:
        got = f"expected {wrong}, got {_spelled(value)}"
        _tell(one.name, got)
        return Invalid(got)
    return number


async def _fired(one: Monitor, episode: Episode) -> str:
    """Return why a monitor fires, or ""."""
    said: Any = None
    with Contained(InfrastructureError, OSError) as ran:
        said = await settled(one.function(episode))
    if ran.error is not None:
        _tell(one.name, f"failed with {type(ran.error).__name__}", ran.error)
    if isinstance(said, str):
        return said[:_LONGEST_REASON]
    return (inspect.getdoc(one.function) or one.name).splitlines()[0][:_LONGEST_REASON] if said else ""


def _two_valued(number: float) -> str:
    return "" if number in (0.0, 1.0) else 'True or False of an outcome (partial credit is kind="shaping")'


def _share(number: float) -> str:
    return "" if 0.0 <= number <= 1.0 else "a number from 0 to 1 of shaping"


def _amount(number: float) -> str:
    return "" if number >= 0.0 else "a number from 0 on of a penalty, which is taken off"


def _any_number(number: float) -> str:
    return ""


_READERS: Final = {
    ScoreKind.OUTCOME: _two_valued,
    ScoreKind.SHAPING: _share,
    ScoreKind.PENALTY: _amount,
}


def _scored(name: str, kind: ScoreKind, weight: float, value: float | Invalid) -> Score:
    if isinstance(value, Invalid):
        reason = " ".join(str(value).split())[:_LONGEST_REASON] or "no reason given"
        return Score(name=name, kind=kind, weight=weight, value=None, invalid=reason)
    return Score(name=name, kind=kind, weight=weight, value=value)


def _tell(name: str, what: str, error: Exception | None = None) -> None:
    _told[name, what] += 1
    if _told[name, what] <= _LOGGED_EACH:
        log.warning("%s: %s", name, what, exc_info=error)


def _named(function: Function) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _spelled(value: object) -> str:
    return repr(value)[:_LONGEST_REASON]
