"""Pictures to mine, whatever holds them, and how near duplicates among them are known.

pictures = open_pictures("photos")             # a folder, a table of paths, or any source of train_encoder
pictures.image(0), pictures.names[0]
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image

from llava_clipmoe.files import replace_surrogates
from train_encoder.config import DataConfig, digest
from train_encoder.data.decode import decode_image
from train_encoder.data.formats import FILE_KINDS, open_source
from train_encoder.data.image_files import image_files
from train_encoder.data.pairs import DataError, PairSource
from train_encoder.data.stores import FileStore
from train_encoder.data.tables import IMAGE_COLUMNS, csv_header, json_rows, name_columns

HASH_SIDE, THUMB_SIDE = 8, 16
HASH_BYTES = HASH_SIDE**2 // 8
LOOKS = HASH_BYTES + 3 * THUMB_SIDE**2
"""Bytes of `looks`."""


@dataclass(frozen=True)
class Pictures:
    """Pictures by number. Can be sent to a loader's workers."""

    names: list[str]
    """What the reader is shown: the path below the folder, or the row's key. Bytes of a file's name that are not UTF-8
    are U+FFFD here, as nothing that is written or drawn takes the surrogates that Python has for them."""
    paths: list[Path] | None
    """Where each is, when they are files of their own."""
    fingerprint: str
    """Other pictures, or the same ones changed, have another."""
    max_pixels: int
    source: PairSource | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", [replace_surrogates(name) for name in self.names])

    def __len__(self) -> int:
        return len(self.names)

    def image(self, i: int) -> Image.Image:
        """Picture i in RGB, read and decoded now. Raises BadImage."""
        if self.paths is None:
            return self.source.image(i)
        with FileStore(Path()).open(i, str(self.paths[i])) as file:
            return decode_image(file, self.max_pixels)


def open_pictures(images: str, *, split: str = "train", leave_out: Path | None = None) -> Pictures:
    """Open a folder of pictures (at any depth, links followed), a CSV/TSV/JSON/JSONL file with a column of paths,
    "openmoji", or anything else that `train_encoder` reads. No captions are needed in the first three.

    `leave_out`: a folder whose pictures are not taken (the results lie there). Raises DataError.
    """
    if images == "openmoji":
        from train_encoder.openmoji.drawings import build_openmoji, list_emoji

        folder = build_openmoji()
        pictures = _files(sorted(image_files(folder / "images")), folder, DataConfig().max_pixels)
        called = {f"images/{emoji.key}.png": emoji.name for emoji in list_emoji()}
        return dataclasses.replace(pictures, names=[called.get(name, name) for name in pictures.names])
    path = Path(images).expanduser()
    if path.is_dir() and not any((path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
        found = sorted(image_files(path, leave_out))
        if found:
            return _files(found, path, DataConfig().max_pixels)
    config = DataConfig(source=images, split=split)
    kind = FILE_KINDS.get(path.suffix.lower()) if path.is_file() else None
    if kind in ("csv", "json"):
        # A picture's own path is its caption: rows without one would be left out, and none is needed here.
        column = _image_column(path, kind)
        config = DataConfig(source=images, split=split, image_column=column, caption_columns=(column,))
        names = [name for source in [open_source(config)] for name in map(source.name, range(len(source)))]
        return _files([path.parent / name for name in names], path.parent, config.max_pixels, names)
    source = open_source(config)
    names = [source.name(i) for i in range(len(source))]
    fingerprint = digest(source.fingerprint, source.images_fingerprint)
    return Pictures(names, None, fingerprint, config.max_pixels, source)


def _files(paths: list[Path], root: Path, max_pixels: int, names: list[str] | None = None) -> Pictures:
    names = names or [path.relative_to(root).as_posix() for path in paths]
    return Pictures(names, paths, digest(list(zip(names, map(_stamp, paths), strict=True))), max_pixels)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):  # missing, or no possible path: it is skipped when its turn comes
        return None
    return found.st_size, found.st_mtime_ns


def _image_column(path: Path, kind: str) -> str:
    """The column of paths of a table, by its name."""
    columns = csv_header(path) if kind == "csv" else list(next(json_rows(path), {}))
    by_lower = {column.lower(): column for column in reversed(columns)}
    for name in IMAGE_COLUMNS:
        if name in by_lower:
            return by_lower[name]
    raise DataError(f"{path} has no column that looks like an image; its columns are: {name_columns(columns)}. Call "
                    "the column with the paths `image`.")  # fmt: skip


# --- near duplicates ------------------------------------------------------------------------------------------------


def looks(image: Image.Image) -> np.ndarray:
    """RGB picture -> uint8 [LOOKS]: its perceptual hash (64 bits, packed), then a small RGB thumbnail.

    The hash sees no colour; the thumbnail sees a clock's hands, which an 8 x 8 one would not.
    """
    bits = np.packbits(imagehash.phash(image, hash_size=HASH_SIDE).hash.reshape(-1))
    thumb = np.asarray(image.resize((THUMB_SIDE, THUMB_SIDE), Image.Resampling.BOX)).reshape(-1)
    return np.concatenate([bits, thumb])


class NearDuplicates:
    """Tells which pairs of pictures are two copies of one, by their looks.

    Two pictures are when at most `max_bits` bits of their hashes differ AND no spot of their thumbnails differs by more
    than `max_colour` (of 255) in a channel: a red and a blue circle have one hash, and are just what is looked for.
    """

    def __init__(self, looks: np.ndarray, max_bits: int, max_colour: int) -> None:
        """looks: uint8 [N, LOOKS], perhaps memory-mapped."""
        self.hashes = np.ascontiguousarray(looks[:, :HASH_BYTES]).view(np.uint64).reshape(-1)
        self.looks, self.max_bits, self.max_colour = looks, max_bits, max_colour

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Numbers of n first and n second pictures -> bool [n]."""
        near = np.bitwise_count(self.hashes[first] ^ self.hashes[second]) <= self.max_bits
        for some in np.array_split(near.nonzero()[0], near.sum() // 4096 + 1):  # thumbnails of a few at a time
            a, b = (self.looks[numbers[some], HASH_BYTES:].astype(np.int16) for numbers in (first, second))
            near[some] = np.abs(a - b).max(1, initial=0) <= self.max_colour
        return near
