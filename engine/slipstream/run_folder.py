"""Floor 3. The run folder: who may use it, which configuration it belongs to, where things are.

config.toml  lock  run.json  versions.json  hub.json  status.json  metrics.jsonl  baselines.json  times.json
restarts.json  tool_cache.sqlite  checkpoints/  weights/  trajectories/  logs/<role>-<n>.log
learning_curve.png  summary.json
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slipstream import config as configuration
from slipstream import plain_json
from slipstream.config import RunConfig
from slipstream.errors import ConfigurationError, RunFolderError

CONFIG = "config.toml"
_OURS = {"lock", CONFIG, f".{CONFIG}.tmp"}


@contextmanager
def opened(folder: Path, config: RunConfig, *, resume: bool) -> Iterator[None]:
    """Hold a run folder: locked, checked against `config`, with config.toml written.

    Raises: RunFolderError when it is in use, belongs to another configuration or to no run at all,
    holds a run and `resume` is False, or holds none and `resume` is True.
    """
    try:
        if not resume:
            folder.mkdir(parents=True, exist_ok=True)
        elif not folder.is_dir():
            raise RunFolderError(f"{folder} holds no run to resume; leave --resume out to start one")
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be used as a run folder: {error.strerror}") from None
    try:
        _lock(lock, folder)
        _check_resume(folder, resume=resume)
        write_config(folder, config)
        yield
    finally:
        os.close(lock)


def write_config(folder: Path, config: RunConfig) -> None:
    """Write config.toml, or check that the one there is the same.

    Raises: RunFolderError naming the first key that differs and both values.
    """
    path = folder / CONFIG
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            configuration.save(config, path)
        except OSError as error:
            raise RunFolderError(f"{path} cannot be written: {error.strerror}") from None
        return
    difference = first_difference(read_config(folder), config)
    if difference:
        key, old, new = difference
        raise RunFolderError(
            f"{folder} belongs to another configuration: {key} is {old!r} there and {new!r} here; "
            "choose another --output or give the same settings"
        )


def read_config(folder: Path) -> RunConfig:
    """Return the configuration a run folder belongs to; raises RunFolderError."""
    path = folder / CONFIG
    if not path.exists():
        raise RunFolderError(f"{folder} is no run folder: it holds no {CONFIG}")
    try:
        return configuration.read(path)
    except ConfigurationError as error:
        raise RunFolderError(f"{path} cannot be used: {error}") from None


def differences(old: RunConfig, new: RunConfig) -> dict[str, Any]:
    """Return the new values of all settings that differ, by dotted key; None: of a key that is gone."""
    ours, theirs = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return {key: theirs.get(key) for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)}


def first_difference(old: RunConfig, new: RunConfig) -> tuple[str, Any, Any] | None:
    """Return (dotted key, old value, new value) of the first setting that differs."""
    ours, theirs = _flat(old.model_dump()), _flat(new.model_dump())
    return next(((key, ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]), None)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object that a role keeps in the folder, or {} when there is none yet."""
    try:
        value = plain_json.read(path)
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Mapping[str, Any], *, private: bool = False) -> None:
    """Replace a JSON file atomically (not fsynced: readers never see half, a power cut may lose it).

    `private`: readable by its owner alone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.touch(0o600 if private else 0o666)
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        raise RunFolderError(
            f"{folder} is in use by process {holder}; stop it first or choose another --output"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


def _check_resume(folder: Path, *, resume: bool) -> None:
    begun = (folder / CONFIG).exists()
    if begun and not resume:
        raise RunFolderError(f"{folder} holds a run already; add --resume or choose another --output")
    if begun:
        return
    if resume:
        raise RunFolderError(f"{folder} holds no run to resume; leave --resume out to start one")
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in _OURS)
    if foreign:
        raise RunFolderError(f"{folder} is no run folder: it holds {foreign[0]}; choose another --output")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
