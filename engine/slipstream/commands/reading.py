"""Floor 7. What has happened in a run."""

from __future__ import annotations

import argparse
import sys

from slipstream.commands.common import Command, folder_args


def _plot(chosen: argparse.Namespace) -> int:
    from slipstream.plots import learning_curve

    sys.stdout.write(f"{learning_curve(chosen.folder)}\n")
    return 0


def _doctor(chosen: argparse.Namespace) -> int:
    from slipstream import doctor

    report, well = doctor.examine(chosen.folder)
    sys.stdout.write(report)
    return 0 if well else 1


COMMANDS = {
    "plot": Command(about="Draw the learning curve of a run.", declare=folder_args, run=_plot),
    "doctor": Command(
        about="Say what the processes of a run wait for, and what is wrong.", declare=folder_args, run=_doctor
    ),
}
