"""Floor 7. Environments."""

from __future__ import annotations

import argparse
import sys

from slipstream.commands.common import Command


def _env_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["list"])


def _env(chosen: argparse.Namespace) -> int:
    from slipstream.environments import SHIPPED
    from slipstream.extras import installation

    width = max(map(len, SHIPPED))
    for name, shipped in SHIPPED.items():
        needs = f" [{installation(shipped.extra)}]" if shipped.extra else ""
        sys.stdout.write(f"{name:<{width}}  {shipped.about}{needs}\n")
    return 0


COMMANDS = {
    "env": Command(about="List the environments.", declare=_env_args, run=_env),
}
