"""Floor 7. The command line: every error of Slipstream is one message on stderr and an exit code.

Roles are imported when they are chosen: a wrong key is answered before torch would have been loaded.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from slipstream.commands import judging, reading, roles, supplies, training, worlds
from slipstream.commands.common import Command
from slipstream.errors import ConfigurationError, SlipstreamError, StorageError, disk_failure
from slipstream.process import guard_parent

INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Raises one sentence instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigurationError."""
        raise ConfigurationError(f"{message}; see {self.prog} --help")


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
    groups = (training, reading, judging, worlds, roles, supplies)
    return {name: command for group in groups for name, command in group.COMMANDS.items()}
