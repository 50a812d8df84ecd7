"""One pass over all images before a training: it finds those that cannot be read and, if asked, keeps the pixels."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llava_clipmoe.files import atomic_file, write_text

from ..progress import Bar
from .arrays import create_array, load_arrays, open_array, save_arrays, write_rows
from .decode import BadImage, ImageTransform
from .pairs import DataError, PairSource

logger = logging.getLogger(__name__)


class RowImages:
    """Images of a source by row, as pixels: decoded now, or read from a file of `build_image_cache`."""

    def __init__(self, source: PairSource, transform: ImageTransform | None, cache: Path | None = None) -> None:
        """transform: None leaves decoded images as they are. Raises DataError when the cache is of other data."""
        self.source, self.transform, self.cache = source, transform, cache
        self._pixels: np.ndarray | None = None
        if cache is not None:
            stored = _stored(_index(cache), _key(source, transform))
            if stored is None or not cache.exists():
                raise DataError(
                    f"{cache} is not a complete image cache of this data at {transform.size} pixels. Delete it and "
                    "build it again, or train without data.cache_images."
                )
            self._slots = stored["slots"]

    def __call__(self, row: int) -> tuple[Any, str | None]:
        """-> (pixels uint8 [3,S,S], None), or (None, why the image is bad)."""
        if self.cache is not None:
            return self._kept(row)
        try:
            image = self.source.image(row)
            return (self.transform(image) if self.transform else image), None
        except BadImage as error:
            return None, str(error)

    def _kept(self, row: int) -> tuple[torch.Tensor | None, str | None]:
        if self._slots[row] < 0:
            return None, f"not in the image cache {self.cache}: bad when it was built"
        if self._pixels is None:
            self._pixels = open_array(self.cache)
        return torch.from_numpy(np.array(self._pixels[self._slots[row]])), None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pixels": None}  # a pickled memmap would carry all its pixels to each worker


class _Scan(Dataset):
    """Row -> why its image is bad, or was not written to `pixels` (an .npy file, if any); None when all is well."""

    def __init__(self, source: PairSource, transform: ImageTransform | None, pixels: Path | None) -> None:
        self.image, self.pixels = RowImages(source, transform), pixels

    def __len__(self) -> int:
        return len(self.image.source)

    def __getitem__(self, row: int) -> str | OSError | None:
        """Errors are given, not raised: a loader would wrap them in a worker's traceback."""
        pixels, error = self.image(row)
        if error is None and self.pixels is not None:
            try:
                write_rows(self.pixels, row, pixels[None].numpy())
            except OSError as full:
                return full
        return error


def _bad_images(scan: _Scan, workers: int, bar: Bar | None) -> list[tuple[int, str]]:
    """Looks at every image -> (row, error) of the bad ones."""
    # The loader gets a random generator of its own. It would draw from torch's global one, and a resumed run, which
    # does not scan, would then train on other random numbers.
    loader = DataLoader(scan, batch_size=32, num_workers=workers, collate_fn=list, generator=torch.Generator())
    bad = []
    for number, errors in enumerate(loader):
        for row, error in enumerate(errors, start=number * loader.batch_size):
            if isinstance(error, OSError):
                raise error
            if error is not None:
                bad.append((row, error))
        if bar is not None:
            bar.advance(len(errors))
    return bad


def build_image_cache(
    source: PairSource, transform: ImageTransform, path: Path, *, workers: int, bar: Bar | None = None
) -> list[tuple[int, str]]:
    """Writes the transformed images to `path`, a memory-mapped uint8 .npy [rows,3,S,S] -> (row, error) of bad images.

    `path` appears only when it is complete; beside it `path` + `.index.npz` says which row lies where and of what
    data. Raises DataError when the disk has no room, and SaveError when others fill it meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(source), 3, transform.size, transform.size)
    need, free = int(np.prod(shape)), shutil.disk_usage(path.parent).free
    if need > free:  # said now, and not hours later
        raise DataError(
            f"The image cache {path} needs {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free. "
            "Free some space, or train without data.cache_images."
        )
    index = _index(path)
    with atomic_file(path) as temporary:
        create_array(temporary, np.uint8, shape)
        bad = _bad_images(_Scan(source, transform, temporary), workers, bar)
        index.unlink(missing_ok=True)  # an index never stands beside pixels that it does not describe
    slots = np.arange(len(source))
    slots[[row for row, _ in bad]] = -1
    save_arrays(index, slots=slots, key=_key(source, transform))
    return bad


def check_images(
    source: PairSource,
    *,
    workers: int,
    max_bad_fraction: float,
    skipped_path: Path,
    bar: Bar | None = None,
    transform: ImageTransform | None = None,
    cache: Path | None = None,
) -> np.ndarray:
    """Decodes every image once; gives a bool mask of the good rows [N].

    Writes the bad ones to `skipped_path`, a JSON line {"row", "image", "error"} each, and its result to a .npz of the
    same name, from which the next call on the same data reads it back. With `cache` (and `transform`) the same pass
    builds the image cache there. Raises DataError when more than `max_bad_fraction` of the images are bad.
    """
    result, key = skipped_path.with_suffix(".npz"), _key(source)
    stored = _stored(result, key)
    if cache is not None and (not cache.exists() or _stored(_index(cache), _key(source, transform)) is None):
        stored = None
    if stored is not None:
        bad = list(zip(stored["rows"].tolist(), stored["errors"].tolist(), strict=True))
    elif cache is not None:
        bad = build_image_cache(source, transform, cache, workers=workers, bar=bar)
    else:
        bad = _bad_images(_Scan(source, None, None), workers, bar)
    bad_rows = np.array([row for row, _ in bad], np.int64)
    if stored is None or not skipped_path.exists():  # of several processes, only the one that looked writes
        lines = [json.dumps({"row": row, "image": source.name(row), "error": error}) + "\n" for row, error in bad]
        write_text(skipped_path, "".join(lines))
        save_arrays(result, key=key, rows=bad_rows, errors=np.array([error for _, error in bad], str))
    _refuse_too_many(source, bad, max_bad_fraction, skipped_path)
    return ~np.isin(np.arange(len(source)), bad_rows)


def _refuse_too_many(source: PairSource, bad: list[tuple[int, str]], limit: float, skipped_path: Path) -> None:
    if not bad:
        return
    share, names = len(bad) / len(source), ", ".join(source.name(row) for row, _ in bad[:3])
    summary = f"{len(bad)} of {len(source)} images ({share:.1%}) are bad, first: {names}. All are in {skipped_path}."
    if share <= limit:
        logger.warning("%s They are skipped.", summary)
        return
    missing = sum(error.startswith("missing") for _, error in bad) * 2 > len(bad)
    hint = "Most are missing: is data.image_root right? If so, repair" if missing else "Repair"
    raise DataError(f"{summary} The first is {bad[0][1]}. {hint} them, or raise data.max_bad_fraction (now {limit}).")


def _key(source: PairSource, transform: ImageTransform | None = None) -> str:
    """Names the images that a stored result was computed from, whatever their captions."""
    size = f" size={transform.size}" if transform else ""
    return f"{source.images_fingerprint} max_pixels={source.max_pixels}{size}"


def _index(cache: Path) -> Path:
    return Path(f"{cache}.index.npz")


def _stored(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """Arrays of a .npz, or None where it is absent, unreadable or of another key."""
    try:
        arrays = load_arrays(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        logger.warning("%s is damaged (%s); its work is done again", path, error)
        return None
    return arrays if str(arrays.get("key")) == key else None
