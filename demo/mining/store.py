"""One array of embeddings that is written row by row and survives a killed run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from llava_clipmoe.files import SaveError, read_json, write_json


class Store:
    """An array [N, width] on disk, filled from the first row on, and a JSON file that says how many rows count."""

    def __init__(self, folder: Path, name: str, key: str, count: int, dtype: str) -> None:
        self.path, self.progress = (folder / f"{name}-{key}{suffix}" for suffix in (".npy", ".json"))
        self.count, self.dtype, self.state = count, np.dtype(dtype), {"done": 0, "bad": {}}
        self._file: Any = None
        if self.progress.exists() and self._fits():
            self.state = read_json(self.progress)

    @property
    def done(self) -> int:
        return self.state["done"]

    def _fits(self) -> bool:
        try:
            found = self.array()
        except (OSError, ValueError):  # missing, or cut short: made again
            return False
        return found.shape[0] == self.count and found.dtype == self.dtype

    def array(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r", allow_pickle=False)

    def write(self, start: int, values: np.ndarray) -> None:
        """Rows from `start` on; they count once `flush` has been called.

        Written with `write`, not through a memory map: a full disk is then an error and not a dead process.
        """
        try:
            if self._file is None:
                if self.done == 0:
                    self.progress.unlink(missing_ok=True)
                    shape = (self.count, values.shape[1])
                    self._refuse_full_disk(self.count * values.shape[1] * self.dtype.itemsize)
                    np.lib.format.open_memmap(self.path, "w+", self.dtype, shape)
                self._offset = self.array().offset
                self._file = self.path.open("r+b")
            self._file.seek(self._offset + start * values.shape[1] * self.dtype.itemsize)
            self._file.write(np.ascontiguousarray(values, self.dtype).tobytes())
        except OSError as error:
            raise self._no_space(error) from error

    def flush(self, done: int, bad: dict[str, str] | None = None) -> None:
        """All rows before `done` are on the disk now, and the progress file says so."""
        if self._file is None or done <= self.done:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._no_space(error) from error
        self.state = {"done": done, "bad": bad or {}}
        write_json(self.progress, self.state)

    def _refuse_full_disk(self, need: int) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if need > free:
            raise SaveError(
                f"the embeddings in {self.path.parent} need {need / 1e9:.1f} GB more, but "
                f"{free / 1e9:.1f} GB are free. Free some space, or give another --cache."
            )

    def _no_space(self, error: OSError) -> SaveError:
        if isinstance(error, SaveError):
            return error
        return SaveError(
            f"could not write embeddings to {self.path}: {error}. What was finished is kept: free some "
            "space and run the same command again."
        )
