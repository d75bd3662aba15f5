"""Floor 7. What has happened in a run."""

from __future__ import annotations

import argparse
import sys

from slipstream.commands.common import Command, folder_args
from slipstream.errors import ConfigurationError


def _plot(chosen: argparse.Namespace) -> int:
    from slipstream.plots import learning_curve

    sys.stdout.write(f"{learning_curve(chosen.folder)}\n")
    return 0


def _doctor(chosen: argparse.Namespace) -> int:
    from slipstream import doctor

    report, well = doctor.examine(chosen.folder)
    sys.stdout.write(report)
    return 0 if well else 1


def _replay_args(parser: argparse.ArgumentParser) -> None:
    folder_args(parser)
    parser.add_argument(
        "trajectory",
        nargs="?",
        default="",
        metavar="TRAJECTORY",
        help="such as actor-0/0/17, or its place in the log, from 0",
    )
    parser.add_argument("--last", action="store_true", help="the newest episode")
    parser.add_argument("--failed", action="store_true", help="the newest episode without success")


def _replay(chosen: argparse.Namespace) -> int:
    if sum((bool(chosen.trajectory), chosen.last, chosen.failed)) != 1:
        raise ConfigurationError("give one of TRAJECTORY, such as actor-0/0/17, --last and --failed")
    from slipstream import replay

    return replay.main(chosen.folder, chosen.trajectory, failed=chosen.failed)


COMMANDS = {
    "plot": Command(about="Draw the learning curve of a run.", declare=folder_args, run=_plot),
    "doctor": Command(
        about="Say what the processes of a run wait for, and what is wrong.", declare=folder_args, run=_doctor
    ),
    "replay": Command(
        about="Play a recorded episode again and say where it differs.", declare=_replay_args, run=_replay
    ),
}
