"""Opens the images of a data source, wherever they are. No store keeps a file open: all can be forked, pickled and read
by threads."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .decode import BadImage


@dataclass
class FileStore:
    """Images as files; a relative name starts from `root`."""

    root: Path
    true_names: dict[str, str] = field(default_factory=dict)
    """Names of files that are not valid UTF-8, by the text that is shown in their place."""

    def open(self, row: int, name: str) -> BinaryIO:
        path = self.root / self.true_names.get(name, name)
        try:
            if path.is_fifo():
                raise BadImage(f"unreadable: {path} is a pipe")  # opening it would wait for ever
            return path.open("rb")
        except FileNotFoundError as error:
            raise BadImage(f"missing: no file {path}") from error
        except (OSError, ValueError) as error:
            raise BadImage(f"unreadable: {error}") from error


@dataclass
class TarStore:
    """Images inside uncompressed tar shards, by shard, offset and size [rows]."""

    shards: list[Path]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def open(self, row: int, name: str) -> BinaryIO:
        path, size = self.shards[self.shard[row]], int(self.size[row])
        try:
            with path.open("rb") as file:
                file.seek(int(self.offset[row]))
                data = file.read(size)
        except OSError as error:
            raise BadImage(f"unreadable: {error}") from error
        if len(data) < size:
            raise BadImage(f"corrupt: {path} ends in the middle of this image")
        return io.BytesIO(data)


@dataclass
class ParquetStore:
    """Image bytes in the row groups of parquet files; the row group read last is kept."""

    groups: list[tuple[Path, int]]
    starts: np.ndarray  # [groups + 1], the first row of each
    column: str
    root: Path | None
    """Where relative paths start; the file's own folder when None."""
    _last: tuple[int, Any] | None = field(default=None, repr=False)

    def open(self, row: int, name: str) -> BinaryIO:
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        path, index = self.groups[group]
        last = self._last  # read once: another thread may replace it
        if last is None or last[0] != group:
            try:
                cells = pq.ParquetFile(path).read_row_group(index, columns=[self.column]).column(0)
            except (OSError, pa.ArrowException) as error:
                raise BadImage(f"unreadable: row group {index} of {path}: {error}") from error
            last = self._last = (group, cells)
        return _open_cell(last[1][row - int(self.starts[group])].as_py(), row, self.root or path.parent)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_last": None}


@dataclass
class DatasetStore:
    """Images in one column of a (memory-mapped) `datasets.Dataset`."""

    dataset: Any
    root: Path

    def open(self, row: int, name: str) -> BinaryIO:
        (cell,) = self.dataset[row].values()
        return _open_cell(cell, row, self.root)


def _open_cell(cell: Any, row: int, root: Path) -> BinaryIO:
    """A table's image cell is bytes, a path, {"bytes", "path"} as `datasets` stores images, or a list of one such."""
    if isinstance(cell, list) and len(cell) > 1:
        raise BadImage(f"several: {len(cell)} images in this row, where one is read")
    if isinstance(cell, list):
        cell = cell[0] if cell else None
    if isinstance(cell, dict):
        data, path = cell.get("bytes"), cell.get("path")
        cell = path if data is None else data
    if not cell:
        raise BadImage("missing: no image bytes in this row")
    return FileStore(root).open(row, cell) if isinstance(cell, str) else io.BytesIO(cell)
