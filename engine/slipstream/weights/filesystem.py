"""Floor 4. Weights through a folder: the learner publishes, backends map the file into memory.

    folder/
      serial-00000042/model.safetensors
      serial-00000042/manifest.json     sizes, sha256, serial, checksum64 of all tensors in name order

A folder appears whole (written aside, fsynced, renamed). A subscriber that has mapped the file keeps it
even when retention removes the folder.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from slipstream import checkpoint
from slipstream.errors import CheckpointError, StorageError
from slipstream.types import WeightUpdate
from slipstream_kernels import checksum64_named

if TYPE_CHECKING:
    import torch

FILE = "model.safetensors"


class FilesystemPublisher:
    """The learner's end: writes each version once and keeps the newest few and the pinned ones.

    Example: ``FilesystemPublisher(run / "weights", keep=4).publish(tensors, serial=7)``.
    """

    def __init__(self, folder: Path, *, keep: int = 4) -> None:
        """Publish under `folder`, which need not exist yet."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder = folder
        self._keep = keep
        self._pinned: set[int] = set()

    def publish(self, tensors: dict[str, torch.Tensor], *, serial: int) -> str:
        """Write `tensors` under a new serial and return the folder that holds them.

        Each name must own its storage: tied weights are passed once.

        Raises: StorageError when the serial was published before.
        """
        target = self.folder / f"serial-{serial:08d}"
        if target.exists():
            raise StorageError(f"{target} exists: serial {serial} was published before")
        notes = {"serial": serial, "checksum64": checksum64_named(tensors)}
        checkpoint.publish(target, lambda folder: checkpoint.write_tensors(folder / FILE, tensors), notes)
        self._remove_old()
        return str(target)

    def newest_serial(self) -> int:
        """Return the largest serial on disk, or -1; a restarted learner goes on above it."""
        return max(self._serials(), default=-1)

    def pin(self, serial: int) -> None:
        """Keep a version on disk until `unpin`, however old it grows."""
        self._pinned.add(serial)

    def unpin(self, serial: int) -> None:
        """Let retention remove a version again."""
        self._pinned.discard(serial)

    def unpin_up_to(self, serial: int) -> None:
        """Let retention remove every version up to `serial` again."""
        self._pinned = {pinned for pinned in self._pinned if pinned > serial}

    def pin_all(self) -> None:
        """Keep every version now on disk: after a restart nobody knows which are still to be evaluated."""
        self._pinned.update(self._serials())

    def _remove_old(self) -> None:
        serials = self._serials()
        kept = {*sorted(serials)[-self._keep :], *self._pinned}
        for serial in serials:
            if serial not in kept:
                shutil.rmtree(self.folder / f"serial-{serial:08d}", ignore_errors=True)

    def _serials(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        matches = (re.fullmatch(r"serial-(\d+)", path.name) for path in self.folder.iterdir())
        return [int(match[1]) for match in matches if match]


class FilesystemSubscriber:
    """The backend's end: maps published weights and checks them."""

    def fetch(self, update: WeightUpdate) -> dict[str, torch.Tensor]:
        """Return the tensors of `update`, memory-mapped.

        Raises: CheckpointError when a file is missing or its size, its tensors or its serial are not
        those announced.
        """
        folder, version = Path(update.folder), update.version
        manifest = checkpoint.read_manifest(folder)
        if manifest.get("serial") != version.serial:
            raise CheckpointError(f"{folder}: expected serial {version.serial}, got {manifest.get('serial')}")
        path = folder / FILE
        expected = manifest["files"].get(FILE, {}).get("size")
        size = path.stat().st_size if path.is_file() else None
        if size is None or size != expected:
            raise CheckpointError(f"{path}: expected {expected} bytes, got {size or 'no file'}")
        tensors = checkpoint.read_tensors(path)
        checksum = checksum64_named(tensors)
        if checksum != version.checksum64:
            raise CheckpointError(
                f"{path}: expected checksum64 {version.checksum64:#018x} for serial {version.serial}, "
                f"got {checksum:#018x}"
            )
        return tensors
