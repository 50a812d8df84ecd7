"""Which files and folders of a data set belong to the split that is asked for, by their names."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from ..config import DataConfig
from .image_files import is_image_name, walk
from .pairs import DataError
from .tables import visible

logger = logging.getLogger(__name__)

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
"""Words in the names of files and folders -> what they mean."""


def _split_word(path: Path, asked: str) -> str | None:
    """The split that a path (below the source) names: in its file's stem, or else in the nearest folder's name."""
    words = "|".join(map(re.escape, sorted({*SPLITS, asked}, key=len, reverse=True)))
    for part in (path.stem, *(parent.name for parent in path.parents)):
        if match := re.search(rf"(?:^|[-_.])({words})(?:$|[-_.\d])", part.lower()):
            return match[1]
    return None


def _by_split(paths: Iterable[Path], asked: str) -> dict[str | None, list[Path]]:
    found: dict[str | None, list[Path]] = {}
    for path in paths:
        found.setdefault(_split_word(path, asked), []).append(path)
    return found


def _chosen(found: dict[str | None, list[Path]], config: DataConfig, what: str) -> list[Path]:
    """The paths of the split that is asked for, by its own word or another that means the same. Raises DataError."""
    asked = config.split.lower()
    meant = [word for word in found if word and SPLITS.get(word, word) == SPLITS.get(asked, asked)]
    words = [asked] if asked in meant else meant
    if not words:
        raise DataError(
            f"{config.source} has no files of split {config.split!r}; it has: "
            f"{', '.join(sorted(filter(None, found)))}. Set data.split."
        )
    if None in found:
        logger.warning(
            "%s: left out %d %s that name no split, such as %s",
            config.source,
            len(found[None]),
            what,
            visible(str(found[None][0])),
        )
    return [path for word in words for path in found[word]]


def of_split(files: list[Path], folder: Path, config: DataConfig) -> list[Path]:
    """The files of the split (`train-00000.parquet`, `dev.csv`, `test/0.tar`); all if none is named after a split."""
    found = _by_split((file.relative_to(folder) for file in files), config.split.lower())
    if set(found) == {None}:
        return files
    chosen = set(_chosen(found, config, "files"))
    return [file for file in files if file.relative_to(folder) in chosen]


def picture_folders_of_split(folder: Path, config: DataConfig) -> set[Path]:
    """The folders whose pictures belong to the split; all of them where they are not sorted by split."""
    places = [place.relative_to(folder) for place, names in walk(folder) if any(map(is_image_name, names))]
    found = _by_split((place / "_" for place in places), config.split.lower())
    splits = {SPLITS.get(word, word) for word in found if word}
    asked = SPLITS.get(config.split.lower(), config.split.lower())
    if not splits or (None in found and splits == {asked}):  # a folder of trains beside one of buses is no split
        return {folder / place for place in places}
    return {folder / path.parent for path in _chosen(found, config, "folders")}
