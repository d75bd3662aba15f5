"""Floor 5. Page and episodes in one file that opens without a server, and without a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from slipstream.errors import RunFolderError
from slipstream.viewing.assets import single_page
from slipstream.viewing.filters import Filters
from slipstream.viewing.run import RunView

MOST_TOKENS: Final = 4096
"""Of one episode; what is cut is said."""


def export(view: RunView, path: Path, given: Mapping[str, str], *, limit: int) -> int:
    """Write whole groups that fit the filters, at most `limit` episodes, and return how many were written.

    The first groups in the order of the filters; of one that does not fit in whole nothing is taken, except
    of the first. Raises ConfigurationError, RunFolderError.
    """
    view.read_all()
    data = exported(view, given, limit=limit)
    try:
        path.write_text(single_page(data), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written: {error.strerror}") from None
    return len(data["episodes"])


def exported(view: RunView, given: Mapping[str, str], *, limit: int) -> dict[str, Any]:
    """Return what the page needs instead of a server."""
    numbers = chosen(view, given, limit=limit)
    episodes = [view.episode(view.place(number), window=MOST_TOKENS) for number in numbers]
    for episode in episodes:
        # The rows hold them already.
        del episode["siblings"], episode["row"]
    rows = [view.lane(number) for number in numbers]
    steps = sorted({row["step"] for row in rows if row["step"] > 0})
    about = view.about()
    return {
        "about": {**about, "episodes_there": about["episodes"], "episodes": len(rows)},
        "given": dict(given),
        "rows": rows,
        "episodes": {episode["id"]: episode for episode in episodes},
        "trained": {str(step): view.trained(step) for step in steps},
    }


def chosen(view: RunView, given: Mapping[str, str], *, limit: int) -> list[int]:
    """Return the rows of whole groups, in order, that make at most `limit` episodes."""
    filters = Filters.of(given)
    fits = filters.mask(view.index)
    if filters.text:
        fits &= view.found(given, filters.text, fits)
    numbers: list[int] = []
    for key in filters.ordered(view.index, fits):
        group = view.index.members[key]
        if numbers and len(numbers) + len(group) > limit:
            break
        numbers += group[:limit]
    return numbers
