"""Floor 4. Did the policy do what the user asked? BFCL's own checks, turn by turn.

After each turn that has gold calls, the policy's and the gold calls, played on objects of their own since the
start, must have led to

    state      equal public attributes of every API
    response   each result of the turn's gold calls, once for each time, among all of the policy's so far

and the policy must have called something in that turn. A turn without gold calls asks for what cannot be done
yet; calls made in it count, as they change the state. The first turn that fails ends the check. Both checks
are the package's own functions: they compare, and evaluate no text.
"""

from __future__ import annotations

from collections.abc import Sequence

from slipstream.environments.bfcl.apis import Apis, Call
from slipstream.environments.bfcl.tasks import Entry


def passed_turns(entry: Entry, played: Sequence[Sequence[Call]], gold: Sequence[Sequence[Call]]) -> int:
    """Return how many turns pass before the first that does not; all of `gold` is a success.

    Example: ``passed_turns(entry, gold, gold) == len(gold)``.
    """
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import response_checker, state_checker

    mine, theirs = (Apis(entry.apis, entry.setting(), long_context=entry.long_context) for _ in range(2))
    said: list[str] = []
    for turn, (calls, gold_calls) in enumerate(zip(played, gold, strict=False)):
        said += [mine.call(name, arguments)[0] for name, arguments in calls]
        expected = [theirs.call(name, arguments)[0] for name, arguments in gold_calls]
        if not gold_calls:
            continue
        try:
            well = (
                bool(calls)
                and state_checker(mine.instances, theirs.instances)["valid"]
                and response_checker(said, expected, turn)["valid"]
            )
        except RecursionError:
            # The policy put a directory into itself; what the gold calls leave behind can be compared.
            well = False
        if not well:
            return turn
    return min(len(played), len(gold))
