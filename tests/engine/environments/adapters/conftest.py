"""What these tests share, and where the stand-ins of foreign packages lie."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

COUNTRIES = {"Norway": "Oslo", "Italy": "Rome", "Japan": "Tokyo"}


@pytest.fixture
def capitals(tmp_path: Path) -> Path:
    """Tasks for the MCP server, with the calls that lead to their answers."""
    rows = [
        {
            "question": f"{split}: the capital of {country}?",
            "answer": capital,
            "split": split,
            "calls": [{"name": "capital", "arguments": {"country": country}}],
        }
        for split in ("train", "heldout", "fresh")
        for country, capital in COUNTRIES.items()
    ]
    return written(tmp_path / "capitals.jsonl", rows)


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """Tasks in the form of SkyRL-gym's rows."""
    rows = [
        {
            "question": f"{split}: {n} + {n}?",
            "split": split,
            "reward_spec": {"method": "rule", "ground_truth": str(2 * n)},
            "extra_info": {"max_turns": 4},
            "expert": ["hm", str(2 * n)],
        }
        for split in ("train", "heldout", "fresh")
        for n in range(3)
    ]
    return written(tmp_path / "sums.jsonl", rows)


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
