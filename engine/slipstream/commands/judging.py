"""Floor 7. Judges."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Final

from slipstream.commands.common import Command, folder_args
from slipstream.errors import ConfigurationError

CACHE: Final = "verdicts.sqlite"
"""In a run folder."""


def _judge_args(parser: argparse.ArgumentParser) -> None:
    folder_args(parser)
    parser.add_argument("--rubric", type=Path, required=True, metavar="FILE.toml", help="what is judged by")
    parser.add_argument("--base-url", required=True, metavar="URL", help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True, metavar="NAME", help="as the server calls it")
    parser.add_argument(
        "--version", default="", help="what the model's name does not say, such as a checkpoint"
    )
    parser.add_argument("--key-from", metavar="VARIABLE", help="environment variable that holds the API key")
    parser.add_argument(
        "--gateway", action="store_true", help="the server is `slipstream gateway`: a rollout for each answer"
    )
    parser.add_argument("--episodes", type=int, default=100, metavar="N", help="the newest (default: 100)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="of one verdict (default: 60)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.6,
        metavar="KAPPA",
        help="least that is good enough (default: 0.6)",
    )
    parser.add_argument(
        "--most-invalid", type=float, default=0.1, metavar="SHARE",
        help="of episodes without a verdict, beyond which it is not good enough (default: 0.1)",
    )  # fmt: skip


def _judge(chosen: argparse.Namespace) -> int:
    for holds, what, got in (
        (chosen.episodes >= 1, "--episodes must be at least 1", chosen.episodes),
        (-1.0 <= chosen.threshold <= 1.0, "--threshold must lie between -1 and 1", chosen.threshold),
        (0.0 <= chosen.most_invalid <= 1.0, "--most-invalid must lie between 0 and 1", chosen.most_invalid),
    ):
        if not holds:
            raise ConfigurationError(f"{what}, got {got}")
    key = os.environ.get(chosen.key_from, "") if chosen.key_from else ""
    if chosen.key_from and not key:
        raise ConfigurationError(f"--key-from: the environment variable {chosen.key_from} is not set")
    from slipstream.calibration import calibrate, report
    from slipstream.judging.judge import Judge
    from slipstream.judging.rubric import read_rubric

    judge = Judge(
        chosen.base_url,
        chosen.model,
        read_rubric(chosen.rubric),
        api_key=key,
        cache=chosen.folder / CACHE if chosen.folder.is_dir() else None,
        timeout_s=chosen.timeout,
        version=chosen.version,
        gateway=chosen.gateway,
    )
    try:
        calibration = calibrate(chosen.folder, judge, episodes=chosen.episodes)
    finally:
        judge.close()
    sys.stdout.write(report(calibration))
    return 0 if calibration.holds(kappa=chosen.threshold, most_invalid=chosen.most_invalid) else 1


COMMANDS = {
    "judge": Command(
        about="Judge recorded episodes by a rubric and compare with their outcomes.",
        declare=_judge_args,
        run=_judge,
    ),
}
