"""Upstream's training data: a broken picture is skipped, a missing one is named, before hours are lost.

Upstream's `LazySupervisedDataset` (llava/train/train.py) opens pictures as it goes and dies of the first that cannot
be read.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

CHECKED_PATHS = 2000
"""Pictures looked for before training starts, evenly over the data: enough for a wrong folder."""
MAX_BAD_SHARE = 0.01
MIN_BAD = 5
"""More than 1% broken pictures (and at least this many) stop the run, as in the encoder's trainer."""
BROKEN_PICTURE = (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, OSError)


class BadTrainingData(ValueError):
    """The conversations or pictures that LLaVA is to be trained on cannot be used."""


def guard(dataset: Any) -> Any:
    """Make a LLaVA data set robust, in place; -> the data set. Raises BadTrainingData when pictures are missing."""
    rows, folder = getattr(dataset, "list_data_dict", None), getattr(dataset.data_args, "image_folder", None)
    if rows is None:
        return dataset
    check_paths(rows, folder)
    _skip_broken(type(dataset))
    return dataset


def check_paths(rows: list[dict[str, Any]], folder: str | None) -> None:
    """Look for a sample of the pictures, the first and the last included; raise BadTrainingData naming the missing."""
    pictures = [row["image"] for row in rows if "image" in row]
    if pictures and folder is None:
        raise BadTrainingData("the data has pictures, but --image_folder is not given.")
    step = max(1, len(pictures) // CHECKED_PATHS)
    sample = [*pictures[::step], *pictures[-1:]]
    missing = [name for name in dict.fromkeys(sample) if not (Path(folder) / name).is_file()]
    if missing:
        raise BadTrainingData(_missing(missing, len(set(sample)), folder))


def _missing(names: list[str], looked_for: int, folder: str | None) -> str:
    shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    return (
        f"{len(names)} of {looked_for} pictures that were looked for are not in {folder}: {shown}. Check "
        "--image_folder (paths in the data are relative to it), finish the download, or take these rows out."
    )


def _skip_broken(cls: type) -> None:
    if hasattr(cls.__getitem__, "skips_broken"):
        return
    upstream = cls.__getitem__

    @functools.wraps(upstream)
    def __getitem__(self, index: int) -> Any:
        for step in range(len(self.list_data_dict)):
            position = (index + step) % len(self.list_data_dict)
            try:
                return upstream(self, position)
            except FileNotFoundError as error:
                name = self.list_data_dict[position].get("image")
                raise BadTrainingData(_missing([str(name)], 1, self.data_args.image_folder)) from error
            except BROKEN_PICTURE as error:
                _count_broken(self, position, error)
        raise BadTrainingData("not one picture of the data can be read.")

    __getitem__.skips_broken = True
    cls.__getitem__ = __getitem__


def _count_broken(dataset: Any, position: int, error: Exception) -> None:
    """Say it once per picture; the next row takes its place. Raises BadTrainingData when there are too many."""
    broken = dataset.__dict__.setdefault("broken_pictures", set())  # one set in each data-loading process
    row = dataset.list_data_dict[position]
    if position not in broken:
        broken.add(position)
        print(
            f"llava-clipmoe: skipped row {row.get('id', position)}: {row.get('image')} cannot be read "
            f"({str(error) or type(error).__name__}); {len(broken)} so far.",
            file=sys.stderr,
        )
    if len(broken) > max(MIN_BAD, MAX_BAD_SHARE * len(dataset.list_data_dict)):
        raise BadTrainingData(
            f"{len(broken)} pictures cannot be read, more than {MAX_BAD_SHARE:.0%} of the data (the last: "
            f"{row.get('image')}: {error}). Something is wrong with the download in {dataset.data_args.image_folder}."
        ) from error
