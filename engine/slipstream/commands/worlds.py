"""Floor 7. Environments."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slipstream import config as configuration
from slipstream.commands.common import Command
from slipstream.config import RunConfig
from slipstream.errors import ConfigurationError


def _env_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["list", "audit"], help="list them, or audit one")
    parser.add_argument("name", nargs="?", metavar="NAME", help="environment or recipe to audit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page to read")
    parser.add_argument("--episodes", type=int, default=24, metavar="N", help="of each policy (default: 24)")
    parser.add_argument("--seed", type=int, metavar="N", help="chooses the tasks (default: as configured)")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="success, as a share of the oracle's, that a policy which knows nothing may have (default: 0.1)",
    )


def _env(chosen: argparse.Namespace) -> int:
    return {"list": _list, "audit": _audit}[chosen.action](chosen)


def _list(chosen: argparse.Namespace) -> int:
    from slipstream.environments import SHIPPED
    from slipstream.extras import installation

    if chosen.name is not None:
        raise ConfigurationError(f'env list takes no name, got "{chosen.name}"')
    width = max(map(len, SHIPPED))
    for name, shipped in SHIPPED.items():
        sys.stdout.write(f"{name:<{width}}  {shipped.about}\n")
        if shipped.extra:
            sys.stdout.write(f"{'':<{width}}  needs: {installation(shipped.extra)}\n")
    return 0


def _audit(chosen: argparse.Namespace) -> int:
    config = _audited_config(chosen)
    seed = config.seed if chosen.seed is None else chosen.seed
    for holds, what, got in (
        (chosen.episodes >= 1, "--episodes must be at least 1", chosen.episodes),
        (seed >= 0, "--seed must be at least 0", seed),
        (0.0 < chosen.threshold < 1.0, "--threshold must lie between 0 and 1", chosen.threshold),
    ):
        if not holds:
            raise ConfigurationError(f"{what}, got {got}")
    if chosen.report is not None and not chosen.report.parent.is_dir():
        raise ConfigurationError(f"--report: there is no folder {chosen.report.parent}")
    from slipstream.environment_audit.page import page
    from slipstream.environment_audit.supervision import audited
    from slipstream.environment_audit.verdicts import Level, Verdict

    def tell(verdict: Verdict) -> None:
        early = f" ({verdict.early})" if verdict.early else ""
        sys.stdout.write(f"{verdict.level}  {verdict.check:<13} {verdict.sentence}{early}\n")
        sys.stdout.flush()

    findings = audited(config, tell, episodes=chosen.episodes, seed=seed, threshold=chosen.threshold)
    failed, warned = findings.count(Level.FAIL), findings.count(Level.WARN)
    sys.stdout.write(
        f"{chosen.name}: {len(findings.verdicts)} checks, {failed} failed, {warned} to look at, "
        f"in {findings.seconds:.1f} s\n"
    )
    if chosen.report is not None:
        facts = {
            "environment": config.environment.name,
            "settings": " ".join(chosen.overrides) or "as they are by default",
            "episodes of each policy": str(chosen.episodes),
            "seed": str(seed),
            "threshold": f"{chosen.threshold:g} of the oracle's success",
        }
        chosen.report.write_text(page(chosen.name, findings, facts), encoding="utf-8")
        sys.stdout.write(f"{chosen.report}\n")
    return 0 if findings.passed else 1


def _audited_config(chosen: argparse.Namespace) -> RunConfig:
    """Return the configuration of a recipe, or the defaults with an environment's name."""
    name = chosen.name
    if name is None or "=" in name:
        raise ConfigurationError(
            "env audit needs the NAME of an environment (`slipstream env list`) or a recipe"
        )
    if name in configuration.shipped_recipes() or name.endswith(".toml"):
        return configuration.load_config(name, chosen.overrides)
    overrides = [f"environment.name={name}", *chosen.overrides]
    base = name.partition(":")[0]
    if base in configuration.shipped_recipes():
        return configuration.load_config(base, overrides)
    return configuration.configured(overrides)


COMMANDS = {
    "env": Command(about="List the environments; audit one.", declare=_env_args, run=_env),
}
