"""Which files and folders of a data set belong to the split that is asked for, by their names."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ..config import DataConfig
from .columns import visible
from .decode import DataError
from .image_files import Tree, is_image_name

logger = logging.getLogger(__name__)

WORDS = {"train": ["training"], "validation": ["val", "valid", "dev"], "test": ["testing"]}
"""Splits, and other words for them in the names of files and folders."""
SPLITS = {word: split for split, words in WORDS.items() for word in [split, *words]}


def files_of_split(files: list[Path], folder: Path, config: DataConfig) -> list[Path]:
    """The files of the split (`train-00000.parquet`, `dev.csv`, `test/0.tar`); all if none is named after a split."""
    found = _by_word(files, folder, config)
    if set(found) == {None}:
        return files
    chosen = set(_chosen(found, folder, config, "files"))
    return [file for file in files if file in chosen]


def picture_folders_of_split(tree: Tree, folder: Path, config: DataConfig) -> set[Path]:
    """The folders whose pictures belong to the split; all of them where they are not sorted by split."""
    places = [place for place, names in tree if any(map(is_image_name, names))]
    found = _by_word([place / "_" for place in places], folder, config)
    asked, meanings = _meaning(config.split.lower()), {_meaning(word) for word in found if word}
    if not meanings or (None in found and meanings == {asked}):  # a folder of trains beside one of buses is no split
        return set(places)
    return {path.parent for path in _chosen(found, folder, config, "folders")}


def _meaning(word: str) -> str:
    return SPLITS.get(word, word)


def _by_word(paths: list[Path], folder: Path, config: DataConfig) -> dict[str | None, list[Path]]:
    """Paths by the split that each names below `folder`: in its file's stem, or else in the nearest folder's name."""
    words = "|".join(map(re.escape, sorted({*SPLITS, config.split.lower()}, key=len, reverse=True)))
    split = re.compile(rf"(?:^|[-_.])({words})(?:$|[-_.\d])")
    found: dict[str | None, list[Path]] = {}
    for path in paths:
        below = path.relative_to(folder)
        matches = (split.search(part.lower()) for part in (below.stem, *(parent.name for parent in below.parents)))
        word = next((match[1] for match in matches if match), None)
        found.setdefault(word, []).append(path)
    return found


def _chosen(found: dict[str | None, list[Path]], folder: Path, config: DataConfig, what: str) -> list[Path]:
    """The paths of the split that is asked for, by its own word or another that means the same. Raises DataError."""
    asked = config.split.lower()
    meant = [word for word in found if word and _meaning(word) == _meaning(asked)]
    words = [asked] if asked in meant else meant
    if not words:
        there = ", ".join(sorted(filter(None, found)))
        raise DataError(f"{config.source} has no files of split {config.split!r}; it has: {there}. Set data.split.")
    if None in found:
        example = visible(str(found[None][0].relative_to(folder)))
        message = "%s: left out %d %s that name no split, such as %s"
        logger.warning(message, config.source, len(found[None]), what, example)
    return [path for word in words for path in found[word]]
