"""Floor 3. Checkpoints that are whole or ignored: one atomic publish per folder.

files -> fsync -> manifest.json (sizes, sha256) -> fsync -> rename -> fsync of the parent -> `latest`

checkpoints/
  step-00000050/        files as the writer made them, and manifest.json
  latest                text: the name of the newest step folder (for people; loading verifies instead)
  best/  warmup/        published by name with `publish_folder`
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipstream import plain_json, tensor_file
from slipstream.errors import CheckpointError, StorageError

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
FORMAT = 1
MAX_MANIFEST_BYTES = 2 << 20
MAX_STATE_BYTES = 64 << 20

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    step: int


def save_checkpoint(folder: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Publish what `write` puts into an empty folder as the checkpoint of `step`; return its folder.

    Keeps the newest `keep` and removes those of later steps: they belong to a branch given up. Raises
    what `write` raises; the checkpoints that are there then stay as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:08d}"
    publish(target, write, {"step": step})
    _write_durably(folder / ".latest.tmp", target.name + "\n")
    (folder / ".latest.tmp").replace(folder / "latest")
    _sync_folder(folder)
    published = _steps(folder)
    kept = [path for number, path in published if number <= step][:keep]
    for _, path in published:
        if path not in kept:
            shutil.rmtree(path)
    return target


def steps_in(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint, whole or not, newest first."""
    return [step for step, _ in _steps(folder)]


def load_latest(folder: Path) -> Checkpoint:
    """Return the newest checkpoint that verifies; a damaged one is skipped with a warning.

    Raises: CheckpointError when there is none, or none is whole.
    """
    damage: list[str] = []
    for step, path in _steps(folder):
        try:
            verify(path)
        except CheckpointError as error:
            damage.append(str(error))
            continue
        for sentence in damage:
            logging.getLogger(__name__).warning("skipped a damaged checkpoint: %s", sentence)
        return Checkpoint(path=path, step=step)
    if damage:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; the newest: {damage[0]}")
    raise CheckpointError(f"{folder} holds no checkpoint")


def verify(path: Path) -> dict[str, Any]:
    """Check every file of a published folder against its manifest and return the manifest.

    Raises: CheckpointError naming the file, what was expected and what was found.
    """
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: expected {entry['size']} bytes, the file is missing")
        size = file.stat().st_size
        if size != entry["size"]:
            raise CheckpointError(f"{file}: expected {entry['size']} bytes, got {size}")
        digest = _sha256(file)
        if digest != entry["sha256"]:
            raise CheckpointError(f"{file}: expected sha256 {entry['sha256']}, got {digest}")
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a folder's manifest without checking the files it lists; raises CheckpointError."""
    file = path / MANIFEST
    try:
        manifest = plain_json.read(file, most_bytes=MAX_MANIFEST_BYTES)
    except OSError as error:
        raise CheckpointError(f"{file}: expected a manifest, got: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{file}: expected a JSON manifest, got damaged text") from None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    entries = list(files.values()) if isinstance(files, dict) else [None]
    if not all(isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in entries):
        raise CheckpointError(f"{file}: expected sizes and sha256 of all files, got another form")
    foreign = [name for name in files or () if not _is_inside(name)]
    if foreign:
        raise CheckpointError(f"{file}: expected names of files beside it, got {foreign[0][:64]!r}")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file}: expected format {FORMAT}, got {manifest.get('format')}")
    return dict(manifest)


def publish_folder(source: Path, target: Path) -> None:
    """Make `target` a verified copy of the published folder `source`, replacing it atomically.

    Raises CheckpointError when `source` does not verify.
    """
    manifest = verify(source)

    def copy(folder: Path) -> None:
        for name in manifest["files"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)

    publish(target, copy, {key: manifest[key] for key in manifest if key not in {"files", "format"}})


def publish(target: Path, write: Callable[[Path], None], notes: Mapping[str, Any]) -> None:
    """Publish what `write` puts into an empty folder as `target`; `notes` go into the manifest.

    Durable; a crash leaves the old `target` or the new one where the file system can exchange folders.
    Raises what `write` raises, before `target` is touched.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a crash
    temporary.mkdir()
    write(temporary)
    files: dict[str, dict[str, Any]] = {}
    for file in sorted(path for path in temporary.rglob("*") if path.is_file()):
        _sync_file(file)
        files[file.relative_to(temporary).as_posix()] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    _write_durably(temporary / MANIFEST, json.dumps({"format": FORMAT, **notes, "files": files}, indent=1))
    for inner in [path for path in temporary.rglob("*") if path.is_dir()]:
        _sync_folder(inner)
    _sync_folder(temporary)
    _replace_folder(temporary, target)
    _sync_folder(target.parent)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors; each name must own its storage (pass tied weights once).

    Raises StorageError (disk full, I/O).
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise StorageError(f"{path}: writing failed ({error}); free space or repair the disk") from error


def read_tensors(
    path: Path, *, dtypes: Mapping[str, int] = tensor_file.ITEM_BYTES
) -> dict[str, torch.Tensor]:
    """Return the memory-mapped tensors of a safetensors file.

    Raises: CheckpointError when it is missing or damaged, or not of the dtypes it may have (tensor_file.py).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensor_file.check(path, dtypes=dtypes)
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected a safetensors file, the file is missing") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: expected a safetensors file, got damage: {error}") from None


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write plain state as JSON; NaN and unknown types are refused."""
    path.write_text(json.dumps(state, allow_nan=False, indent=1), encoding="utf-8")


def read_state(path: Path) -> dict[str, Any]:
    """Return what `write_state` wrote; raises CheckpointError."""
    try:
        return dict(plain_json.read(path, most_bytes=MAX_STATE_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path}: expected state, got: {error.strerror}") from None
    except (TypeError, ValueError):
        raise CheckpointError(f"{path}: expected a JSON object, got damaged text") from None


def _is_inside(name: str) -> bool:
    """Return whether a name of a manifest stays in its folder, and can be one."""
    parts = name.split("/")
    return "\0" not in name and not {"", ".", ".."} & set(parts)


def _replace_folder(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`, exchanging the two in one step when `target` exists."""
    if not target.exists():
        temporary.rename(target)
        return
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = os.fsencode(temporary), os.fsencode(target)
    if renameat2 and renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        # The old files must not go before the new folder has their name for good.
        _sync_folder(target.parent)
        shutil.rmtree(temporary)
        return
    # The file system cannot exchange: for one instant only the old folder's other name exists.
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of all published checkpoints, the newest first."""
    found: list[tuple[int, Path]] = []
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            match = re.fullmatch(r"step-(\d+)", path.name)
            if match and path.is_dir():
                found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync_file(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
