"""Floor 3. What a run was made with: Python, packages and data, recorded in its folder and compared later.

    versions.json    {"python": "3.11.7", "slipstream": "0.1.0", "torch": "2.11.0", "world": "1", ...}

The same task, tool or score under another version may be another one: a run goes on only with what it
began with, unless its user says otherwise.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from slipstream.errors import RunFolderError
from slipstream.run_folder import read_json, write_json

FILE = "versions.json"
SOURCE = "source tree"
"""Version of a package that runs without being installed."""
ACCEPT = "--other-versions"
"""What a user says to go on regardless."""


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of some packages; one that is not installed is a source tree."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = SOURCE
    return versions


def present(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a run is made with here and now; `environment`: what its factory says it depends on."""
    return {**installed(("slipstream", "torch")), **environment}


def differences(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return a phrase for each version that is another one, such as "torch is 2.12.0 here and was 2.11.0"."""
    names = sorted(recorded.keys() | now.keys())
    return [
        f"{name} is {now.get(name, 'not used')} here and was {recorded.get(name, 'not used')}"
        for name in names
        if recorded.get(name) != now.get(name)
    ]


def hold(folder: Path, now: Mapping[str, str], *, accept: bool) -> list[str]:
    """Record the versions of a run, or compare them with those it began with; return what differs.

    Raises RunFolderError when one differs and `accept` is False; else those of now count from now on.
    """
    recorded = recorded_in(folder)
    different = differences(recorded, now) if recorded else []
    if different and not accept:
        raise RunFolderError(
            f"{folder} was begun with other versions: {'; '.join(different)}; install those again, or add "
            f"{ACCEPT} to go on with these"
        )
    if recorded != now:
        write_json(folder / FILE, now)
    return different


def recorded_in(folder: Path) -> dict[str, str]:
    """Return the versions that a run was made with; {} when it recorded none."""
    return {name: str(version) for name, version in read_json(folder / FILE).items()}


def of_checkpoint(checkpoint: Path) -> dict[str, str]:
    """Return the versions of the run that a checkpoint lies in, RUN/checkpoints/NAME; {} when it has none."""
    folder = checkpoint.resolve().parent
    return recorded_in(folder.parent) if folder.name == "checkpoints" else {}
