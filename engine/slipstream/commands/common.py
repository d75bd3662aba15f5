"""Floor 7. What commands share: their form, recipes, run folders, flight recorders."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slipstream import config as configuration
from slipstream import run_folder
from slipstream.config import RunConfig
from slipstream.errors import ConfigurationError, RunFolderError, SlipstreamError
from slipstream.flight_recorder import FLIGHT, FOLDER

Declare = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One subcommand."""

    about: str
    declare: Declare
    run: Run


def recipe_args(parser: argparse.ArgumentParser) -> None:
    """Declare RECIPE and overrides."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a shipped recipe, or a .toml file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ")


def role_args(parser: argparse.ArgumentParser) -> None:
    """Declare what a role is started with."""
    recipe_args(parser)
    parser.add_argument("--output", type=Path, help="run folder; its config.toml serves without RECIPE")


def joining_args(parser: argparse.ArgumentParser) -> None:
    """Declare how a role finds a hub elsewhere."""
    role_args(parser)
    parser.add_argument("--hub", metavar="ADDRESS", help="hub on another machine, such as tcp://host:5555")
    parser.add_argument("--run", metavar="ID", help="its run, as in the hub's hub.json; goes with --hub")


def folder_args(parser: argparse.ArgumentParser) -> None:
    """Declare RUN."""
    parser.add_argument("folder", type=Path, metavar="RUN")


def recorded(ring: Path, run: Callable[[], int]) -> int:
    """Run a role with its flight recorder on (flight_recorder.py)."""
    FLIGHT.start(ring)
    try:
        code = run()
    except (SlipstreamError, OSError) as error:
        FLIGHT.note(f"failed: {error}")
        FLIGHT.end()
        raise
    except SystemExit as end:
        FLIGHT.note(f"stopped with exit code {end.code}")
        FLIGHT.end()
        raise
    FLIGHT.note(f"done with exit code {code}")
    FLIGHT.end()
    return code


def ring_of(folder: Path, name: str) -> Path:
    """Return the flight recorder's file of a role."""
    return folder / FOLDER / f"{name}.ring"


def recipe_of(chosen: argparse.Namespace) -> tuple[str, list[str]]:
    """Return recipe and overrides; `train seed=2` has taken an override for the recipe."""
    if chosen.recipe is None or "=" in chosen.recipe:
        shipped = ", ".join(configuration.shipped_recipes())
        raise ConfigurationError(f"a RECIPE is missing; shipped are {shipped}, or give a .toml file")
    return chosen.recipe, chosen.overrides


def resolve(chosen: argparse.Namespace, *, existing: bool) -> tuple[RunConfig, Path]:
    """Return configuration and absolute run folder; `existing` allows a folder without a recipe."""
    if existing and chosen.recipe is None and chosen.output is not None:
        return run_folder.read_config(chosen.output), chosen.output.resolve()
    recipe, overrides = recipe_of(chosen)
    config = configuration.load_config(recipe, overrides)
    folder = chosen.output or Path("runs") / f"{Path(recipe).stem}-{config.seed}"
    return config, folder.resolve()


def role_folder(chosen: argparse.Namespace) -> tuple[RunConfig, Path]:
    """Return what a role started alone works on, with config.toml written."""
    config, folder = resolve(chosen, existing=True)
    run_folder.write_config(folder, config)
    return config, folder


def note_hub(folder: Path, address: str | None, run: str | None) -> None:
    """Write where and what the hub is for a role that runs on another machine than the hub."""
    if (address is None) != (run is None):
        raise ConfigurationError("--hub ADDRESS and --run ID go together; both stand in the hub's hub.json")
    if address is None:
        return
    for file, key, value in (("hub.json", "address", address), ("run.json", "run", run)):
        known = run_folder.read_json(folder / file).get(key)
        if known not in {None, value}:
            raise RunFolderError(f"{folder / file} has {key} {known}, not {value}; choose another --output")
        run_folder.write_json(folder / file, {key: value})
