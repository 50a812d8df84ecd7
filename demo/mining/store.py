"""One array of embeddings that is written row by row and survives a killed run."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np

from llava_clipmoe.files import SaveError, flush_to_disk, read_json, write_json
from train_encoder.data.arrays import create_array, open_array, write_rows


class Store:
    """An array [N, width] on disk, and a JSON file that says how many of its rows are done and which are bad."""

    def __init__(self, folder: Path, name: str, key: str, count: int, dtype: str) -> None:
        self.path, self.progress = folder / f"{name}-{key}.npy", folder / f"{name}-{key}.json"
        self.count, self.dtype = count, np.dtype(dtype)
        self.done, self.bad = 0, {}
        with contextlib.suppress(OSError, ValueError):  # missing, or cut short: it is made again
            self.array()
            state = read_json(self.progress)
            self.done, self.bad = state["done"], state["bad"]
        self.created = self.done > 0

    def array(self) -> np.ndarray:
        return open_array(self.path)

    def write(self, start: int, values: np.ndarray) -> None:
        """Rows from `start` on; they count once `flush` has been called. Raises SaveError."""
        try:
            if not self.created:
                self._create(values.shape[1])
            write_rows(self.path, start, values)
        except OSError as error:
            raise SaveError(
                f"could not write embeddings to {self.path}: {error}. What was finished is kept: free some space, or "
                "give another --cache, and run the same command again."
            ) from error

    def _create(self, width: int) -> None:
        need, free = self.count * width * self.dtype.itemsize, shutil.disk_usage(self.path.parent).free
        if need > free:  # said now, and not hours later
            raise OSError(f"{need / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free there")
        self.progress.unlink(missing_ok=True)
        create_array(self.path, self.dtype, (self.count, width))
        self.created = True

    def flush(self, done: int, bad: dict[str, str]) -> None:
        """Put all rows before `done` onto the disk, then say so in the progress file."""
        if done > self.done:
            flush_to_disk(self.path)
            self.done = done
            write_json(self.progress, {"done": done, "bad": bad})
