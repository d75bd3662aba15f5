"""Floor 4. What users have written, by name: agents that play the episodes, environments."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Final, cast

from slipstream.errors import ConfigurationError
from slipstream.extras import require
from slipstream.interfaces import AgentProgram

Program = AgentProgram | Callable[..., float | None]
"""A coroutine function, or a plain one of the same arguments, which gets a thread."""
OUTSIDE: Final = "outside"
"""Named in the place of a program: agents come by themselves."""
_KEY: Final = "agent.program"


def check_program(name: str) -> None:
    """Refuse early what cannot be loaded, without running it; raises ConfigurationError."""
    require("gateway", "starlette", "uvicorn", by=_KEY)
    if name == OUTSIDE:
        return
    where, _ = _parts(name, _KEY)
    package = where.partition(".")[0]
    if not (Path(where).is_file() if where.endswith(".py") else find_spec(package)):
        raise ConfigurationError(
            f"agent.program: cannot find {where}; give path.py:function, or a module that Python can import"
        )


def load_program(name: str) -> Program:
    """Return the function that `module:function` or `path.py:function` names; raises ConfigurationError."""
    program = attribute_at(name, key=_KEY)
    if not callable(program):
        raise ConfigurationError(f"{_KEY}: expected {name} to be a function, got {type(program).__name__}")
    return cast(Program, program)


def attribute_at(name: str, *, key: str) -> object:
    """Return what `module:attribute` or `path.py:attribute` names; raises ConfigurationError naming `key`."""
    where, attribute = _parts(name, key)
    try:
        module = _module_of_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (ImportError, SyntaxError, OSError) as error:
        raise ConfigurationError(f"{key}: cannot load {where} ({error})") from error
    if not hasattr(module, attribute):
        raise ConfigurationError(f"{key}: expected {attribute} in {where}, found no such name")
    found: object = getattr(module, attribute)
    return found


def _parts(name: str, key: str) -> tuple[str, str]:
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise ConfigurationError(f"{key}: expected module:attribute or path.py:attribute, got {name!r}")
    return where, attribute


def _module_of_file(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no Python file: {path}")
    module = module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
