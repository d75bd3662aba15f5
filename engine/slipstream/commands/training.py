"""Floor 7. Training, and a policy tried out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from slipstream import config as configuration
from slipstream import versions
from slipstream.commands.common import Command, recipe_args, recipe_of, recorded, resolve
from slipstream.config import RunConfig
from slipstream.errors import ConfigurationError
from slipstream.types import Split

if TYPE_CHECKING:
    from slipstream.fork import Fork


def _train_args(parser: argparse.ArgumentParser) -> None:
    recipe_args(parser)
    parser.add_argument("--output", type=Path, help="run folder (default: runs/RECIPE-SEED)")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's last checkpoint")
    parser.add_argument(
        "--fork", metavar="RUN[@STEP]", help="begin with a checkpoint of that run, under its settings"
    )
    parser.add_argument("--serial", action="store_true", help="one thread, deterministic")
    parser.add_argument(
        versions.ACCEPT, action="store_true", help="go on with other packages or data than the run began with"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and stop")


def _train(chosen: argparse.Namespace) -> int:
    forked = None
    if chosen.fork is None:
        config, folder = resolve(chosen, existing=chosen.resume)
    else:
        config, folder, forked = _forked(chosen)
    if chosen.dry_run:
        sys.stdout.write(configuration.dump(config))
        return 0
    from slipstream import display, launch

    screen = display.make_screen(config, folder, sys.stdout)
    return launch.train(
        config,
        folder,
        resume=chosen.resume,
        serial=chosen.serial,
        screen=screen,
        forked=forked,
        other_versions=chosen.other_versions,
    )


def _forked(chosen: argparse.Namespace) -> tuple[RunConfig, Path, Fork]:
    """Return configuration, folder and beginning of a fork; all that stands beside are settings."""
    settings = [text for text in (chosen.recipe, *chosen.overrides) if text is not None]
    if chosen.resume:
        raise ConfigurationError(
            "--fork begins a run and --resume goes on with one; leave --fork out to go on with a fork"
        )
    if chosen.output is None:
        raise ConfigurationError("--fork needs --output DIR, a new folder for the run that it begins")
    if settings and "=" not in settings[0]:
        raise ConfigurationError(f"--fork takes the recipe of its run; leave {settings[0]} out")
    from slipstream import fork

    config, beginning = fork.planned(chosen.fork, settings)
    return config, chosen.output.resolve(), beginning


def _rollout_args(parser: argparse.ArgumentParser) -> None:
    recipe_args(parser)
    parser.add_argument("-n", type=int, default=8, help="episodes (default: 8)")
    parser.add_argument("--checkpoint", type=Path, help="policy to use (default: scripted demonstrations)")


def _rollout(chosen: argparse.Namespace) -> int:
    config = configuration.load_config(*recipe_of(chosen))
    if chosen.n < 1:
        raise ConfigurationError(f"-n must be at least 1, got {chosen.n}")
    from slipstream import evaluate

    return evaluate.rollout(config, chosen.n, chosen.checkpoint)


def _eval_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--recipe", required=True, help="a shipped recipe, or a .toml file")
    parser.add_argument("--split", choices=[split.value for split in Split], default=Split.FRESH.value)
    parser.add_argument("--tasks", type=int, help="default: evaluation.final_tasks")
    parser.add_argument("--attempts", type=int, default=1, metavar="K", help="at each task, for pass@k")
    parser.add_argument("--temperature", type=float, help="default: evaluation.temperature")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--flight", type=Path, help=argparse.SUPPRESS)


def _eval(chosen: argparse.Namespace) -> int:
    config = configuration.load_config(chosen.recipe, chosen.overrides)
    tasks = config.evaluation.final_tasks if chosen.tasks is None else chosen.tasks
    if tasks < 1:
        raise ConfigurationError(f"--tasks must be at least 1, got {tasks}")
    if chosen.attempts < 1:
        raise ConfigurationError(f"--attempts must be at least 1, got {chosen.attempts}")
    temperature = config.evaluation.temperature if chosen.temperature is None else chosen.temperature
    if not temperature >= 0.0:
        raise ConfigurationError(f"--temperature must be at least 0, got {temperature}")
    from slipstream import evaluate

    def run() -> int:
        return evaluate.main(
            config,
            chosen.checkpoint,
            split=Split(chosen.split),
            tasks=tasks,
            attempts=chosen.attempts,
            temperature=temperature,
            output=chosen.output,
        )

    return run() if chosen.flight is None else recorded(chosen.flight, run)


COMMANDS = {
    "train": Command(
        about="Train an agent from its warm start to the summary.", declare=_train_args, run=_train
    ),
    "rollout": Command(about="Print a few episodes to read.", declare=_rollout_args, run=_rollout),
    "eval": Command(about="Measure the success of a checkpoint.", declare=_eval_args, run=_eval),
}
