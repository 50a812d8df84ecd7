"""Arrays on disk: .npy files that are filled a few rows at a time, by several processes too, and small .npz files.

Rows are written with `write`, not through a memory map: a full disk is then an error and not a dead process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_clipmoe.files import atomic_file


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
    with open(path, "r+b") as file:
        file.seek(array.offset + start * array[:1].nbytes)
        file.write(np.ascontiguousarray(values, array.dtype).tobytes())
        if durable:
            file.flush()
            os.fsync(file.fileno())


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write a .npz at once."""
    with atomic_file(path) as temporary:
        np.savez(temporary, **arrays)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a .npz."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
