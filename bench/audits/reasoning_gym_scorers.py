"""Which scorers of reasoning-gym can be trusted: every dataset, fuzzed with constant answers.

    python bench/audits/reasoning_gym_scorers.py    # writes scorers.json beside the environment that reads it

For each dataset, over its first entries: the constant answer that pays best, on average and as the share of
entries it solves (score 1.0); whether the scorer raises at any of them; the least it gives to its own
answers; whether an entry is the same when it is drawn again, and what drawing one costs; whether the scorer
runs answers as code. What
the environment refuses to train on follows from this file alone.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import reasoning_gym
from reasoning_gym.factory import DATASETS

from slipstream.environments.reasoning_gym.entries import RAISED, runs_answers

TARGET = Path(__file__).parents[2] / "engine/slipstream/environments/reasoning_gym/scorers.json"
ENTRIES = 40
MOST_S = 4.0
"""Of CPU time for drawing; a slow dataset is judged by fewer entries."""
LEAST = 4
WORDS = """zzz 0 1 2 3 10 -1 0.5 1/2 yes no Yes No true false True False A B C a b None null nan unknown
heads x [] {} [[]] () [0] [[0]] {'a':0} 0,0 , - . # * 1/0"""
CONSTANTS = (
    *WORDS.split(), "", " ", "0 0 0\n0 0 0\n0 0 0", "a" * 1000, "0 " * 400, "\N{PILE OF POO}"
)  # fmt: skip


def main() -> None:
    """Fuzz every dataset and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, default=TARGET)
    parser.add_argument("--only", nargs="*", help="datasets; all by default")
    chosen = parser.parse_args()
    found: dict[str, Any] = {}
    for name in sorted(chosen.only or DATASETS.keys() - {"composite"}):
        began = time.monotonic()
        # Some datasets print.
        with contextlib.redirect_stdout(io.StringIO()):
            found[name] = fuzzed(name)
        sys.stdout.write(f"{name}: {json.dumps(found[name])} {time.monotonic() - began:.1f} s\n")
        sys.stdout.flush()
    report = {
        "package": "reasoning-gym",
        "version": version("reasoning-gym"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "entries": ENTRIES,
        "constants": len(CONSTANTS),
    }
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in found.items())
    head = json.dumps(report, indent=2).removesuffix("\n}")
    chosen.json.write_text(f'{head},\n  "datasets": {{\n{rows}\n  }}\n}}\n')


def fuzzed(name: str) -> dict[str, Any]:
    """Return what the scorer of one dataset does."""
    dataset = reasoning_gym.create_dataset(name, size=ENTRIES, seed=20_261)
    again = reasoning_gym.create_dataset(name, size=ENTRIES, seed=20_261)
    entries: list[Any] = []
    began = time.process_time()
    while len(entries) < ENTRIES and (len(entries) < LEAST or time.process_time() - began < MOST_S):
        entries.append(dataset[len(entries)])
    draw_s = (time.process_time() - began) / len(entries)
    raises: set[str] = set()
    paid: dict[str, tuple[float, float]] = {}
    for constant in CONSTANTS:
        scores = np.array([_score(dataset, constant, entry, raises) for entry in entries])
        paid[constant] = (float(scores.mean()), float((scores >= 1.0).mean()))
    best = max(paid, key=lambda constant: max(paid[constant]))
    own = [_score(dataset, entry["answer"], entry, set()) for entry in entries]
    same = all(
        (again[i]["question"], again[i]["answer"]) == (entry["question"], entry["answer"])
        # Backwards: an entry must not depend on those drawn before it.
        for i, entry in reversed(list(enumerate(entries[:12])))
    )
    return {
        "constant": best[:40],
        "pays": round(paid[best][0], 3),
        "solves": round(paid[best][1], 3),
        "own": round(float(min(own)), 3),
        "raises": sorted(raises),
        "repeats": same,
        "draw_s": round(draw_s, 2),
        "runs": runs_answers(dataset),
    }


def _score(dataset: Any, answer: str, entry: Any, raises: set[str]) -> float:
    try:
        return float(dataset.score_answer(answer=answer, entry=entry))
    except RAISED as error:
        raises.add(type(error).__name__)
        return 0.0


if __name__ == "__main__":
    main()
