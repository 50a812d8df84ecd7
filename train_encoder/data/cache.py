"""One pass over all images before a training: it finds those that cannot be read and, if asked, keeps the pixels on
disk.

good = check_images(source, workers=8, max_bad_fraction=0.01, skipped_path=run / "skipped.jsonl")
"""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from llava_clipmoe.files import atomic_file, write_text

from .arrays import create_array, open_array, write_rows
from .decode import BadImage, ImageTransform
from .pairs import DataError, PairSource

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


class _Scan(Dataset):
    """Decodes rows one by one; writes them into the .npy file `pixels` where there is one."""

    def __init__(self, source: PairSource, rows: np.ndarray, transform: ImageTransform | None, pixels: Path | None):
        self.rows, self.pixels = rows, pixels
        self.read = RowImages(source, transform or _as_it_is)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, slot: int) -> tuple[int, str | OSError | None]:
        """A row, and why its image is bad or its pixels were not written. Returned, not raised: a loader would wrap the
        error in a worker's traceback."""
        row = int(self.rows[slot])
        pixels, error = self.read(row)
        try:
            if error is None and self.pixels is not None:
                write_rows(self.pixels, slot, pixels[None].numpy())
        except OSError as full:
            return row, full
        return row, error


def _bad_rows(scan: _Scan, workers: int, progress: Progress | None) -> Iterator[tuple[int, str]]:
    # The loader gets a random generator of its own. It would draw from torch's global one, and a resumed run, which
    # does not scan, would then train on other random numbers.
    loader = DataLoader(scan, batch_size=32, num_workers=workers, collate_fn=list, generator=torch.Generator())
    done = 0
    for results in loader:
        for row, error in results:
            if isinstance(error, OSError):
                raise error
            if error is not None:
                yield row, error
        done += len(results)
        if progress is not None:
            progress(done, len(scan))


def build_image_cache(
    source: PairSource,
    rows: np.ndarray,
    transform: ImageTransform,
    path: Path,
    *,
    workers: int,
    progress: Progress | None = None,
) -> list[tuple[int, str]]:
    """Writes the transformed images of `rows` to `path`, a memory-mapped uint8 .npy [len(rows),3,S,S].

    `path` appears only when it is complete; beside it `path` + `.index.npz` says which row lies where and of what
    data. Gives (row, error) of bad images, whose slots stay unused. Raises DataError when the disk has no room, and
    SaveError when others fill it meanwhile.
    """
    rows, path = np.asarray(rows, np.int64), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(rows), 3, transform.size, transform.size)
    need, free = int(np.prod(shape)), shutil.disk_usage(path.parent).free
    if need > free:  # said now, and not hours later
        raise DataError(
            f"The image cache {path} needs {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free. Free "
            "some space, or train without data.cache_images."
        )
    index = _cache_index(path)
    with atomic_file(path) as temporary:
        create_array(temporary, np.uint8, shape)
        bad = list(_bad_rows(_Scan(source, rows, transform, temporary), workers, progress))
        index.unlink(missing_ok=True)  # an index never stands beside pixels that it does not describe
    slots = np.full(len(source), -1, np.int64)
    slots[rows] = np.arange(len(rows))
    slots[[row for row, _ in bad]] = -1
    _save_arrays(index, slots=slots, key=_key(source, transform))
    return bad


class ImageCache:
    """Reads what build_image_cache wrote."""

    def __init__(self, path: Path, source: PairSource, transform: ImageTransform) -> None:
        stored = _load_arrays(_cache_index(path), _key(source, transform))
        if stored is None or not path.exists():
            raise DataError(
                f"{path} is not a complete image cache of this data at {transform.size} pixels. Delete it "
                "and build it again, or train without data.cache_images."
            )
        self._path, self._slots = path, stored["slots"]
        self._pixels: np.ndarray | None = None

    def read(self, row: int) -> torch.Tensor:
        """uint8 [3,S,S]. Raises BadImage for a row that is not in the cache."""
        if self._slots[row] < 0:
            raise BadImage(f"not in the image cache {self._path}: bad, or left out, when it was built")
        if self._pixels is None:
            self._pixels = open_array(self._path)
        return torch.from_numpy(np.array(self._pixels[self._slots[row]]))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pixels": None}  # a pickled memmap would carry all its pixels to each worker


class RowImages:
    """Images of a source by row, decoded now or read from a file of `build_image_cache`."""

    def __init__(self, source: PairSource, transform: Callable[[Image.Image], Any], cache: Path | None = None) -> None:
        """transform: of decoded images (as a rule an ImageTransform). Raises DataError when the cache is of other
        data."""
        self.source, self.transform = source, transform
        self.cache = None if cache is None else ImageCache(cache, source, transform)

    def __call__(self, row: int) -> tuple[Any, str | None]:
        """-> (what `transform` gives, None), or (None, why the image is bad)."""
        try:
            return (self.transform(self.source.image(row)) if self.cache is None else self.cache.read(row)), None
        except BadImage as error:
            return None, str(error)


def _as_it_is(image: Image.Image) -> Image.Image:
    return image


def check_images(
    source: PairSource,
    *,
    workers: int,
    max_bad_fraction: float,
    skipped_path: Path,
    progress: Progress | None = None,
    transform: ImageTransform | None = None,
    cache: Path | None = None,
) -> np.ndarray:
    """Decodes every image once; gives a bool mask of the good rows [N].

    Writes the bad ones to `skipped_path`, a JSON line {"row", "image", "error"} each, and its result to a .npz of the
    same name, from which the next call on the same data reads it back. With `cache` (and `transform`) the same pass
    builds the image cache there. Raises DataError when more than `max_bad_fraction` of the images are bad.
    """
    skipped_path, rows = Path(skipped_path), np.arange(len(source))
    result, key = skipped_path.with_suffix(".npz"), _key(source)
    stored = _load_arrays(result, key)
    if cache is not None:
        if transform is None:
            raise ValueError("check_images builds an image cache only with a transform: pass both.")
        if not Path(cache).exists() or _load_arrays(_cache_index(cache), _key(source, transform)) is None:
            stored = None
    if stored is not None:
        bad = list(zip(stored["rows"].tolist(), stored["errors"].tolist(), strict=True))
    elif cache is not None:
        bad = build_image_cache(source, rows, transform, cache, workers=workers, progress=progress)
    else:
        bad = list(_bad_rows(_Scan(source, rows, None, None), workers, progress))
    bad_rows = np.array([row for row, _ in bad], np.int64)
    if stored is None or not skipped_path.exists():  # of several processes, only the one that looked writes
        lines = [json.dumps({"row": row, "image": source.name(row), "error": error}) + "\n" for row, error in bad]
        write_text(skipped_path, "".join(lines))
        _save_arrays(result, key=key, rows=bad_rows, errors=np.array([error for _, error in bad], str))
    _refuse_too_many(source, bad, max_bad_fraction, skipped_path)
    return ~np.isin(rows, bad_rows)


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
    """Names the data that a stored result was computed from."""
    # Captions are no part of it: the base may train on other captions of the same pictures, from the same cache.
    return f"{source.images_fingerprint} max_pixels={source.max_pixels}" + (
        f" size={transform.size}" if transform else ""
    )


def _cache_index(path: Path) -> Path:
    return Path(f"{path}.index.npz")


def _save_arrays(path: Path, **arrays: Any) -> None:
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _load_arrays(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """Arrays of a .npz, or None where it is absent, unreadable or of another key."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        logger.warning("%s is damaged (%s); its work is done again", path, error)
        return None
    return arrays if str(arrays.get("key")) == key else None
