"""Floor 3. The CURVE keys of a hub and its clients, as files.

    DIR/hub.key                the hub's pair; it stays on the hub's machine
    DIR/authorized/NAME.toml   name, role and public key of who is let in; without this file it is not
    DIR/NAME.key               the pair of one client, and the hub's public key: all that its machine needs

TOML, keys in Z85. The folder is 0700 and every file 0600; a secret that others may read is not used.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import tomli_w
import zmq

from slipstream.errors import ConfigurationError

HUB: Final = "hub"
AUTHORIZED: Final = "authorized"
ROLES: Final = ("actor", "learner")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_Z85: Final = re.compile(r"[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{40}")
_LEAST_LIBZMQ: Final = (4, 3, 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubKeys:
    """What the hub proves itself with, and where it looks up others."""

    public_key: bytes
    secret_key: bytes = field(repr=False)
    authorized: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientKeys:
    """What one client proves itself with, and the hub it insists on."""

    file: Path
    public_key: bytes
    secret_key: bytes = field(repr=False)
    hub_public_key: bytes


def make_keys(folder: Path, names: Mapping[str, str]) -> list[Path]:
    """Make the pairs that are missing, of the hub and of each name -> role; return the files written.

    Raises ConfigurationError for a name that cannot be one, or a folder that cannot be written.
    """
    for name in names:
        if not _NAME.fullmatch(name) or name == HUB:
            raise ConfigurationError(
                f'keys: expected names of letters, digits, ".", "_" and "-", other than "{HUB}", got "{name}"'
            )
    written: list[Path] = []
    try:
        for place in (folder, folder / AUTHORIZED):
            place.mkdir(parents=True, exist_ok=True)
            place.chmod(0o700)
        if not (folder / f"{HUB}.key").exists():
            written.append(_write(folder / f"{HUB}.key", _new_pair()))
        hub_public = _read(folder / f"{HUB}.key", ("public_key",))["public_key"]
        for name, role in names.items():
            if not (folder / f"{name}.key").exists():
                written += _make_client(folder, name, role, hub_public)
    except OSError as error:
        raise ConfigurationError(f"{error.filename}: {error.strerror}; choose another folder") from None
    return written


def hub_keys(folder: str) -> HubKeys | None:
    """Return the hub's keys in a folder, or None for ""; raises ConfigurationError."""
    if not folder:
        return None
    values = _secret(Path(folder).absolute() / f"{HUB}.key", ("public_key", "secret_key"))
    return HubKeys(
        public_key=values["public_key"].encode(),
        secret_key=values["secret_key"].encode(),
        authorized=Path(folder).absolute() / AUTHORIZED,
    )


def client_keys(folder: str, name: str) -> ClientKeys | None:
    """Return a client's keys in a folder, or None for ""; raises ConfigurationError."""
    if not folder:
        return None
    file = Path(folder).absolute() / f"{name}.key"
    values = _secret(file, ("public_key", "secret_key", "hub_public_key"))
    return ClientKeys(file=file, **{key: value.encode() for key, value in values.items()})


class AllowList:
    """Who is let in: the folder `authorized`, looked at again for each question.

    Example: ``AllowList(folder / "authorized").user_of(public_key)  # "actor/actor-0"``.
    """

    def __init__(self, folder: Path) -> None:
        """Read the list; raises ConfigurationError when there is none or an entry is not valid."""
        self._folder = folder
        if not folder.is_dir():
            raise ConfigurationError(f"hub.keys: expected a folder {folder}; make it with `slipstream keys`")
        self._signature = self._look()
        self._users = dict(map(_entry, self._files()))

    def user_of(self, public_key: bytes) -> str | None:
        """Return "role/name" of a Z85 public key, or None when it is not on the list now."""
        signature = self._look()
        if signature != self._signature:
            self._signature, self._users = signature, {}
            for file in self._files():
                try:
                    key, user = _entry(file)
                except ConfigurationError:
                    continue  # half written, or spoilt: nobody is let in by it
                self._users[key] = user
        return self._users.get(public_key)

    def _files(self) -> Iterable[Path]:
        return sorted(self._folder.glob("*.toml"))

    def _look(self) -> frozenset[tuple[str, int, int, int]]:
        """Return what changes with any change of the list."""
        seen = set()
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    state = entry.stat()
                    seen.add((entry.name, state.st_ino, state.st_mtime_ns, state.st_size))
        except FileNotFoundError:
            pass  # removed while we looked: the next question sees the rest
        return frozenset(seen)


def _make_client(folder: Path, name: str, role: str, hub_public: str) -> list[Path]:
    pair = _new_pair()
    public = {"name": name, "role": role, "public_key": pair["public_key"]}
    return [
        _write(folder / AUTHORIZED / f"{name}.toml", public),
        _write(folder / f"{name}.key", {**pair, "hub_public_key": hub_public}),
    ]


def _new_pair() -> dict[str, str]:
    public, secret = zmq.curve_keypair()
    return {"public_key": public.decode(), "secret_key": secret.decode()}


def _write(path: Path, values: Mapping[str, str]) -> Path:
    """Write a file that nobody else may read, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(tomli_w.dumps(values))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return path


def _entry(file: Path) -> tuple[bytes, str]:
    """Return (public key, "role/name") of a file of the allow-list."""
    values = _read(file, ("name", "role", "public_key"))
    name, role = values["name"], values["role"]
    if role not in ROLES or name != file.stem:
        raise ConfigurationError(
            f"{file}: expected role actor or learner and name {file.stem}, got {role} {name}"
        )
    return values["public_key"].encode(), f"{role}/{name}"


def _secret(file: Path, wanted: tuple[str, ...]) -> dict[str, str]:
    # Older ones let anybody overflow their CURVE handshake (CVE-2019-13132).
    if zmq.zmq_version_info() < _LEAST_LIBZMQ or not zmq.has("curve"):
        raise ConfigurationError(
            f"hub.keys: expected libzmq >= 4.3.5 with CURVE, got {zmq.zmq_version()}; install pyzmq >= 26.4 "
            f"from its wheel"
        )
    values = _read(file, wanted)
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        raise ConfigurationError(f"{file}: others may read this secret (mode {mode:o}); chmod 600 it")
    return values


def _read(file: Path, wanted: tuple[str, ...]) -> dict[str, str]:
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"hub.keys: {file} cannot be read ({error.strerror}); make it with `slipstream keys "
            f"{file.parent}`, or copy it from where it was made"
        ) from None
    except ValueError as error:
        raise ConfigurationError(f"{file}: not valid TOML: {error}") from None
    for key in wanted:
        value = values.get(key)
        if not isinstance(value, str) or (key.endswith("_key") and not _Z85.fullmatch(value)):
            raise ConfigurationError(f"{file}: {key} must be text, and a key 40 characters of Z85")
    return {key: values[key] for key in wanted}
