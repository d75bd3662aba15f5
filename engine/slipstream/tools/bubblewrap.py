"""Floor 4. How a sandbox's fork server is started: inside bubblewrap, or as a plain process.

Inside bubblewrap there is no network and, read-only, nothing of the host but /usr, this Python and the
packages it needs; every worker then gets namespaces of its own inside. A plain process sees the host's
files as its user does.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

from slipstream.errors import ConfigurationError

Backend = Literal["process", "bubblewrap"]
CODE: Final = "/code"
"""Where our packages lie inside bubblewrap."""
SCRATCH: Final = "/tmp"
"""The workers' scratch folder inside bubblewrap."""
ENVIRONMENT: Final = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
"""All that a fork server finds in its environment, beside PYTHONPATH."""
_LINKED_INTO_USR: Final = ("/bin", "/sbin", "/lib", "/lib64")
_FILES: Final = ("/etc/ld.so.cache", "/etc/localtime")
_DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def command(backend: Backend, control: int, packages: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command line and environment of a fork server that talks over file descriptor `control`.

    `packages` are names of importable top-level packages or modules. Raises ConfigurationError.
    """
    server = [sys.executable, "-sP", "-m", "slipstream.tools.forkserver", str(control)]
    places = [place_of(package) for package in packages]
    if backend == "process":
        roots = dict.fromkeys(str(place.parent) for place in places)
        return server, ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(roots)}
    program = shutil.which("bwrap")
    if program is None:
        raise ConfigurationError(
            'environment.sandbox = "bubblewrap" needs the program bwrap: expected it on PATH, found none; '
            'install bubblewrap or choose "process"'
        )
    return [program, *_walls(places), "--", *server], {}


def place_of(package: str) -> Path:
    """Return the folder or file of a top-level package or module; raises ConfigurationError."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ConfigurationError(f"sandbox: expected an importable package, got {package}")
    origin = Path(found.origin)
    return origin.parent if found.submodule_search_locations else origin


def _walls(places: Sequence[Path]) -> Iterator[str]:
    yield from ("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
    if os.geteuid() != 0:
        yield "--unshare-user"
    yield from ("--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL")
    if os.geteuid() == 0:
        # For giving each worker a uid of its own.
        yield from ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
    yield from ("--clearenv", "--setenv", "PYTHONPATH", CODE)
    for name, value in ENVIRONMENT.items():
        yield from ("--setenv", name, value)
    yield from ("--ro-bind", "/usr", "/usr")
    for path in _LINKED_INTO_USR:
        if os.path.islink(path):
            yield from ("--symlink", os.readlink(path), path)
        else:
            yield from ("--ro-bind-try", path, path)
    prefixes = [p for p in dict.fromkeys((sys.base_prefix, sys.prefix)) if not Path(p).is_relative_to("/usr")]
    # Made explicitly: folders that a mount implies are closed to other uids.
    for folder in sorted({str(parent) for p in (*prefixes, *_DEVICES, *_FILES, f"{CODE}/x") for parent in
                          list(Path(p).parents)[:-1]} | {SCRATCH}):  # fmt: skip
        yield from ("--perms", "0755", "--dir", folder)
    for path in _FILES:
        yield from ("--ro-bind-try", path, path)
    for path in _DEVICES:
        yield from ("--dev-bind", path, path)
    for prefix in prefixes:
        yield from ("--ro-bind", prefix, prefix)
    for place in places:
        yield from ("--ro-bind", str(place), f"{CODE}/{place.name}")
    yield from ("--proc", "/proc", "--chdir", SCRATCH, "--remount-ro", "/")


def scratch_folder(backend: Backend) -> str:
    """Return the folder that workers write to, as they name it; a plain process's is made here."""
    if backend == "bubblewrap":
        return SCRATCH
    folder = tempfile.mkdtemp(prefix="slipstream-sandbox-")
    # Workers of another uid must get through.
    Path(folder).chmod(0o711)
    return folder
