"""Floor 4. Tasks from a Hugging Face dataset on disk: a folder that `save_to_disk` made, or of Parquet files.

    train/*.arrow, test/*.arrow                     save_to_disk of a DatasetDict
    *.arrow                                         save_to_disk of a Dataset: split by a stable hash
    train-00000-of-00002.parquet, data/test.parquet  as on the Hub

Nothing is fetched and no code of a dataset runs: pyarrow reads the columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from slipstream.authoring.tasks import SPLITS, Row, RowTasks, checked_row
from slipstream.errors import ConfigurationError
from slipstream.extras import require
from slipstream.types import Split

SUFFIXES: Final = (".arrow", ".parquet")


def dataset(path: str | Path, *, question: str = "question") -> RowTasks:
    """Return the tasks of a dataset's folder: one column is the `question`, all others are data."""
    folder = Path(path)
    return RowTasks(lambda: _rows(folder, question), source=str(folder), question=question)


def _rows(folder: Path, question: str) -> Iterator[tuple[str, Row, Split | None]]:
    require("datasets", "pyarrow", by=f"the dataset in {folder}")
    files = sorted(
        path
        for path in folder.rglob("*")
        # What `datasets` has computed from the others lies beside them.
        if path.suffix in SUFFIXES and path.is_file() and not path.name.startswith("cache-")
    )
    if not files:
        raise ConfigurationError(
            f"tasks: expected a dataset in {folder} (*.arrow of save_to_disk, or *.parquet), found none"
        )
    for file in files:
        split = _split_of(file.relative_to(folder))
        for number, row in enumerate(_read(file)):
            place = f"{file}, row {number}"
            plain, said = checked_row(row, place, question)
            yield place, plain, said or split


def _split_of(path: Path) -> Split | None:
    """Return the split that a file's name or folder says, as test-00000-of-00001.parquet does."""
    for part in (path.name, *(parent.name for parent in path.parents)):
        word = re.split(r"[-_.]", part)[0]
        if word in SPLITS:
            return SPLITS[word]
    return None


def _read(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of one file, batch by batch; raises ConfigurationError when it is damaged."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        if file.suffix == ".parquet":
            for batch in parquet.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
            return
        with arrow.memory_map(str(file)) as mapped, arrow.ipc.open_stream(mapped) as batches:
            for batch in batches:
                yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise ConfigurationError(f"tasks: {file} cannot be read: {str(error).splitlines()[0]}") from None
