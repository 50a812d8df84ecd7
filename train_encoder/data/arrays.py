"""Arrays on disk (.npy) that are filled a few rows at a time, by one process or by several with rows of their own.

Rows are written with `write`, not through a memory map: a full disk is then an error and not a dead process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def create_array(path: Path, dtype: np.dtype | type, shape: Sequence[int]) -> None:
    """An array of zeros whose rows can be written. Raises OSError."""
    np.lib.format.open_memmap(path, "w+", dtype, tuple(shape)).flush()


def array_fits(path: Path, dtype: np.dtype | type, shape: Sequence[int]) -> bool:
    """Whether the file holds a whole array of this kind; False for one that is missing or cut short."""
    try:
        found = open_array(path)
    except (OSError, ValueError):
        return False
    return found.shape == tuple(shape) and found.dtype == dtype


def open_array(path: Path) -> np.ndarray:
    """The array, read from disk as it is used."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def write_rows(path: Path, start: int, values: np.ndarray, durable: bool = False) -> None:
    """Put `values` [n,...] into the rows from `start` on; durable: they are on the disk when this returns.

    Raises OSError when the disk is full.
    """
    array = open_array(path)
    values = np.ascontiguousarray(values, array.dtype)
    with open(path, "r+b") as file:
        file.seek(array.offset + start * array[:1].nbytes)
        file.write(values.tobytes())
        if durable:
            file.flush()
            os.fsync(file.fileno())
