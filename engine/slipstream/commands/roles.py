"""Floor 7. Each process of a run alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slipstream.commands.common import (
    Command,
    joining_args,
    note_hub,
    recorded,
    resolve,
    ring_of,
    role_args,
    role_folder,
)
from slipstream.types import Split


def _warmup(chosen: argparse.Namespace) -> int:
    config, folder = role_folder(chosen)
    from slipstream import warmup

    return recorded(ring_of(folder, "warmup-0"), lambda: warmup.main(config, folder))


def _hub(chosen: argparse.Namespace) -> int:
    config, folder = role_folder(chosen)
    from slipstream import hub

    return recorded(ring_of(folder, "hub-0"), lambda: hub.main(config, folder))


def _actor_args(parser: argparse.ArgumentParser) -> None:
    joining_args(parser)
    parser.add_argument("--name", default="actor-0", help="unique among the actors of a run")


def _actor(chosen: argparse.Namespace) -> int:
    config, folder = role_folder(chosen)
    note_hub(folder, chosen.hub, chosen.run)
    from slipstream import actor

    return recorded(ring_of(folder, chosen.name), lambda: actor.main(config, folder, chosen.name))


def _learner(chosen: argparse.Namespace) -> int:
    config, folder = role_folder(chosen)
    note_hub(folder, chosen.hub, chosen.run)
    from slipstream import learner

    return recorded(ring_of(folder, "learner-0"), lambda: learner.main(config, folder))


def _serve_args(parser: argparse.ArgumentParser) -> None:
    joining_args(parser)
    parser.add_argument("--name", default="serve-0", help="unique among the roles of a run")
    parser.add_argument("--check", action="store_true", help="have the run's servers prove what they hold")


def _serve(chosen: argparse.Namespace) -> int:
    from slipstream.inference.vllm.serving import check_installed

    check_installed()
    from slipstream import serve

    if chosen.check:
        config, folder = resolve(chosen, existing=True)
        report, well = serve.check(config, folder)
        sys.stdout.write(report)
        return 0 if well else 1
    config, folder = role_folder(chosen)
    note_hub(folder, chosen.hub, chosen.run)
    return recorded(ring_of(folder, chosen.name), lambda: serve.main(config, folder, chosen.name))


def _gateway_args(parser: argparse.ArgumentParser) -> None:
    role_args(parser)
    parser.add_argument("--checkpoint", type=Path, help="policy to serve (default: the run's best)")
    parser.add_argument("--split", choices=[split.value for split in Split], default=Split.HELDOUT.value)
    parser.add_argument("--port", type=int, default=8000, help="on the loopback; 0: a free one")
    parser.add_argument(
        "--greedy", action="store_true", help="say the likeliest, as a judge should, instead of sampling"
    )


def _gateway(chosen: argparse.Namespace) -> int:
    config, folder = resolve(chosen, existing=True)
    from slipstream.programs import OUTSIDE, check_program

    check_program(OUTSIDE)
    from slipstream import open_gateway

    return open_gateway.main(
        config,
        folder,
        chosen.checkpoint,
        split=Split(chosen.split),
        port=chosen.port,
        greedy=chosen.greedy,
    )


COMMANDS = {
    "warmup": Command(about="Run the warm start alone.", declare=role_args, run=_warmup),
    "hub": Command(about="Run the hub alone.", declare=role_args, run=_hub),
    "actor": Command(about="Run one actor; it may join a hub at any time.", declare=_actor_args, run=_actor),
    "learner": Command(about="Run the learner alone.", declare=joining_args, run=_learner),
    "serve": Command(
        about="Serve a run's policy to its actors with vLLM, or check who does.",
        declare=_serve_args,
        run=_serve,
    ),
    "gateway": Command(
        about="Serve a policy to agents outside, through OpenAI's interface.",
        declare=_gateway_args,
        run=_gateway,
    ),
}
