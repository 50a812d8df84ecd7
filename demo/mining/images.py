"""Pictures to mine, whatever holds them: a folder, a table of paths, a data set."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llava_clipmoe.files import replace_surrogates
from train_encoder.config import DataConfig
from train_encoder.data.columns import IMAGE_COLUMNS, name_columns
from train_encoder.data.decode import decode_image
from train_encoder.data.formats import FILE_KINDS, open_source
from train_encoder.data.image_files import image_files
from train_encoder.data.pairs import DataError, PairSource
from train_encoder.data.stores import FileStore
from train_encoder.data.tables import csv_header, json_rows
from train_encoder.saved_settings import digest


@dataclass(frozen=True)
class Pictures:
    """Pictures by number. Can be sent to a loader's workers."""

    names: list[str]
    """For people: the path below the folder, or the row's key; U+FFFD for bytes of a file's name that are not UTF-8,
    since neither files nor figures take the surrogates that Python has for them."""
    paths: list[Path] | None
    """Where each is, when they are files of their own; else they are in `source`."""
    fingerprint: str
    """Changes with the pictures and their order."""
    source: PairSource | None = None

    def __len__(self) -> int:
        return len(self.names)

    def image(self, i: int) -> Image.Image:
        """Picture i in RGB, read and decoded now. Raises BadImage."""
        if self.paths is None:
            return self.source.image(i)
        with FileStore(Path()).open(i, str(self.paths[i])) as file:
            return decode_image(file, DataConfig.max_pixels)


def open_pictures(images: str, *, split: str = "train", leave_out: Path | None = None) -> Pictures:
    """Open a folder of pictures (at any depth, links followed), a CSV/TSV/JSON/JSONL file with a column of paths,
    "openmoji", or anything else that `train_encoder` reads. No captions are needed in the first three.

    `leave_out`: a folder whose pictures are not taken (that of the results). Raises DataError.
    """
    if images == "openmoji":
        from train_encoder.openmoji.build import build_openmoji

        paths = sorted(image_files(build_openmoji() / "images"))
        return _files(paths, [f"images/{path.name}" for path in paths])
    path = Path(images).expanduser()
    if path.is_dir() and not any((path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
        if paths := sorted(image_files(path, leave_out)):
            return _files(paths, [found.relative_to(path).as_posix() for found in paths])
    config = DataConfig(source=images, split=split)
    kind = FILE_KINDS.get(path.suffix.lower()) if path.is_file() else None
    if kind in ("csv", "json"):
        # A picture's own path is its caption: rows without one would be left out, and none is needed here.
        column = _image_column(path, kind)
        config = DataConfig(source=images, split=split, image_column=column, caption_columns=(column,))
    source = open_source(config)
    names = [source.name(i) for i in range(len(source))]
    if kind in ("csv", "json"):
        return _files([path.parent / name for name in names], names)
    return Pictures(names, None, digest(source.fingerprint, source.images_fingerprint), source)


def _files(paths: list[Path], names: list[str]) -> Pictures:
    fingerprint = digest(list(zip(names, map(_stamp, paths), strict=True)))
    return Pictures([replace_surrogates(name) for name in names], paths, fingerprint)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of change; None for what is not there, which is skipped when its turn comes."""
    if not os.path.exists(path):  # also where the name is no possible one
        return None
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _image_column(path: Path, kind: str) -> str:
    """The column of paths of a table, by its name."""
    columns = csv_header(path) if kind == "csv" else list(next(json_rows(path), {}))
    by_lower = {column.lower(): column for column in reversed(columns)}
    for name in IMAGE_COLUMNS:
        if name in by_lower:
            return by_lower[name]
    raise DataError(
        f"{path} has no column that looks like an image; its columns are: {name_columns(columns)}. Call "
        "the column with the paths `image`."
    )
