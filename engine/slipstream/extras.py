"""Floor 1. Packages that only some runs need: said to be missing before anything has begun."""

from __future__ import annotations

from importlib.util import find_spec

from slipstream.errors import ConfigurationError


def require(extra: str, *packages: str, by: str) -> None:
    """Raise ConfigurationError unless all `packages` of an extra can be imported; none of them is.

    by: what needs them, the subject of the sentence. Example: ``require("gateway", "starlette", by="view")``.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ConfigurationError(
            f"{by} needs the extra {extra}, and {missing[0]} is not installed; "
            f"run pip install 'slipstream[{extra}]'"
        )
