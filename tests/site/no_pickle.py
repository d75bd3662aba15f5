"""Fails whatever makes the engine or the kernels turn bytes into objects or code, in all processes of a test.

`install` wraps what unpickles (pickle, marshal, torch.load; dill, joblib, shelve, cloudpickle and numpy.load
stand on these) and watches exec, eval and compile. Unpickling is a breach when a function of ours is on the
stack, up to an import: what a library does on being imported is not ours. Of exec, eval and compile only
direct calls by ours are breaches: dataclasses, pydantic and torch generate code of their own.

A breach raises, and is written into the file that SLIPSTREAM_BREACHES names, since an `except` may hide it.
Python starts with this where tests/site is on PYTHONPATH (sitecustomize.py).
"""

from __future__ import annotations

import _pickle
import functools
import importlib.machinery
import marshal
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

REPORT = "SLIPSTREAM_BREACHES"
PACKAGES = ("slipstream", "slipstream_kernels")
ROOT = Path(__file__).parents[2]
FOLDERS = tuple(f"{ROOT / part}{os.sep}" for part in ("engine", "kernels"))
CODE = frozenset({"exec", "compile"})
IMPORT = "<frozen importlib"
# They keep what they compiled, pickled, in a folder of the user's own.
THEIRS = ("torch._inductor.", "torch._dynamo.", "torch._functorch.", "triton.")


class Breach(AssertionError):
    """Bytes were about to become objects or code."""


def install() -> None:
    """Watch this process from now on."""
    for module in (pickle, _pickle):
        module.loads = _guarded(module.loads, f"{module.__name__}.loads")  # type: ignore[attr-defined]
        module.load = _guarded(module.load, f"{module.__name__}.load")  # type: ignore[attr-defined]
    for name in ("Unpickler", "_Unpickler"):
        setattr(pickle, name, _guarded_class(getattr(pickle, name)))
    _pickle.Unpickler = pickle.Unpickler  # type: ignore[misc]
    for name in ("_load", "_loads"):
        setattr(pickle, name, _guarded(getattr(pickle, name), f"pickle.{name}"))
    marshal.loads = _guarded(marshal.loads, "marshal.loads")
    marshal.load = _guarded(marshal.load, "marshal.load")
    sys.meta_path.insert(0, _AfterImport())
    sys.addaudithook(_audit)


def _guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _refuse_ours(name)
        return function(*args, **kwargs)

    return guarded


def _guarded_class(base: type) -> type:
    def load(self: Any) -> Any:
        _refuse_ours(f"{base.__name__}.load")
        return base.load(self)  # type: ignore[attr-defined]

    return type(base.__name__, (base,), {"load": load, "__module__": "pickle"})


class _AfterImport:
    """Wraps torch.load as soon as torch is there."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != "torch.serialization":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def run_and_wrap(module: ModuleType) -> None:
            run(module)
            module.load = _guarded(module.load, "torch.load")  # type: ignore[attr-defined]

        spec.loader.exec_module = run_and_wrap  # type: ignore[method-assign]
        return spec


def _refuse_ours(what: str) -> None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(IMPORT):
        if str(frame.f_globals.get("__name__")).startswith(THEIRS):
            return
        if _is_ours(frame):
            _report(what, frame)
        frame = frame.f_back


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event in CODE:
        # Python itself compiles what it starts with: nobody called.
        frame = sys._getframe().f_back
        if frame is not None and _is_ours(frame):
            _report(event, frame)


def _is_ours(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__"))
    return name.split(".")[0] in PACKAGES or frame.f_code.co_filename.startswith(FOLDERS)


def _report(what: str, frame: FrameType) -> None:
    breach = f"{frame.f_globals.get('__name__')}:{frame.f_lineno} reaches {what}"
    if report := os.environ.get(REPORT):
        with open(report, "a", encoding="utf-8") as file:
            file.write("\n".join([breach, *traceback.format_stack(frame, limit=6), ""]))
    raise Breach(breach)
