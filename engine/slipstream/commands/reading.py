"""Floor 7. What has happened in a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

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


def _view_args(parser: argparse.ArgumentParser) -> None:
    folder_args(parser)
    parser.add_argument(
        "--port", type=int, default=8080, help="on the loopback (default: 8080; 0: a free one)"
    )
    parser.add_argument("--export", type=Path, metavar="FILE", help="write page and episodes into one file")
    parser.add_argument("--limit", type=int, default=256, help="most episodes of --export (default: 256)")
    parser.add_argument(
        "--filter", action="append", default=[], metavar="key=value",
        help="episodes of --export, by keys of the page's address, such as outcome=success",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", type=Path, help="shows its log-probabilities beside the recorded ones"
    )


def _view(chosen: argparse.Namespace) -> int:
    if chosen.limit < 1:
        raise ConfigurationError(f"--limit must be at least 1, got {chosen.limit}")
    from slipstream.extras import require
    from slipstream.viewing.run import RunView

    given = dict(_pair(text) for text in chosen.filter)
    if given and chosen.export is None:
        raise ConfigurationError("--filter goes with --export; the page has filters of its own")
    scorer = None
    if chosen.checkpoint is not None:
        from slipstream.run_folder import read_config
        from slipstream.viewing.gap import GapScorer

        scorer = GapScorer.of(chosen.checkpoint, read_config(chosen.folder))
    view = RunView(chosen.folder, scorer=scorer, scored_with=str(chosen.checkpoint or ""))
    if chosen.export is None:
        require("gateway", "starlette", "uvicorn", by="view without --export")
        from slipstream.viewing.server import serve

        return serve(view, port=chosen.port)
    from slipstream.viewing.export import export

    count = export(view, chosen.export, given, limit=chosen.limit)
    more = " (--limit takes more)" if count < view.index.count and not given else ""
    sys.stdout.write(f"{chosen.export}: {count} of {view.index.count} episodes{more}\n")
    return 0


def _pair(text: str) -> tuple[str, str]:
    key, found, value = text.partition("=")
    if not found:
        raise ConfigurationError(f'--filter: expected key=value, got "{text}"')
    return key, value


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
    "view": Command(
        about="Read the episodes of a run in a browser, or export them.", declare=_view_args, run=_view
    ),
    "doctor": Command(
        about="Say what the processes of a run wait for, and what is wrong.", declare=folder_args, run=_doctor
    ),
    "replay": Command(
        about="Play a recorded episode again and say where it differs.", declare=_replay_args, run=_replay
    ),
}
