"""Encode pictures once by every encoder; what is encoded stays on disk for the next run.

`train_encoder.features` encodes a source with captions by one model, and would decode every picture once a model.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from llava_clipmoe.files import SaveError, flush_to_disk, read_json, remove_leftovers, write_json
from train_encoder.config import DataConfig
from train_encoder.data.arrays import create_array, open_array, write_rows
from train_encoder.data.decode import BadImage
from train_encoder.data.pairs import DataError
from train_encoder.features.encode import Precision, pick_device
from train_encoder.progress import Bar
from train_encoder.saved_settings import digest

from .duplicates import looks
from .encoders import Tower
from .images import Pictures

FORMAT = 1
"""Raise it when the same models and pictures give other numbers."""
FLUSH_SECONDS = 10.0
"""A killed run repeats at most this much work."""
MAX_BAD = 0.5
"""Share of unreadable pictures that stops the run: it is the wrong folder, or a broken disk."""
LOOKS = "looks"


@dataclass(frozen=True)
class Encoded:
    """N pictures, a row each, memory-mapped; the row of a skipped picture means nothing."""

    embeddings: dict[str, np.ndarray]
    """[N,P] fp16, by encoder."""
    looks: np.ndarray
    bad: dict[int, str]
    """Why a picture was skipped."""
    encoded: int
    """Pictures that were decoded by this run: 0 where all came from the cache."""


class Store:
    """An array [N, width] that is written row by row and survives a killed run: a JSON file beside it says how many of
    its rows are done, and which pictures are bad."""

    def __init__(self, folder: Path, name: str, key: str, count: int, dtype: str) -> None:
        self.path, self.progress = folder / f"{name}-{key}.npy", folder / f"{name}-{key}.json"
        self.count, self.dtype = count, np.dtype(dtype)
        self.done, self.bad = 0, {}
        with contextlib.suppress(OSError, ValueError):  # missing, or cut short: it is made again
            open_array(self.path)
            state = read_json(self.progress)
            self.done, self.bad = state["done"], state["bad"]
        self.created = self.done > 0

    def write(self, start: int, values: np.ndarray) -> None:
        """Rows from `start` on; they count once `flush` has been called. Raises SaveError."""
        try:
            if not self.created:
                shape = (self.count, values.shape[1])
                need, free = math.prod(shape) * self.dtype.itemsize, shutil.disk_usage(self.path.parent).free
                if need > free:  # said now, and not hours later
                    raise OSError(f"{need / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free there")
                self.progress.unlink(missing_ok=True)
                create_array(self.path, self.dtype, shape)
                self.created = True
            write_rows(self.path, start, values)
        except OSError as error:
            raise SaveError(
                f"could not write embeddings to {self.path}: {error}. What was finished is kept: free some space, or "
                "give another --cache, and run the same command again."
            ) from error

    def flush(self, done: int, bad: dict[str, str]) -> None:
        """Put all rows before `done` onto the disk, then say so in the progress file."""
        if done > self.done:
            flush_to_disk(self.path)
            self.done = done
            write_json(self.progress, {"done": done, "bad": bad})


def encode_pictures(
    pictures: Pictures,
    towers: Sequence[Tower],
    cache: Path,
    *,
    device: str = "auto",
    precision: Precision = "fp32",
    batch_size: int = 64,
    workers: int = 0,
) -> Encoded:
    """Every picture by every encoder of `towers`, each decoded once; what `cache` has of them is used.

    Other pictures, weights or precision have another key there; the batch size is no part of it. Raises DataError when
    over half of the pictures cannot be read, NotFinite, SaveError (what is done is kept).
    """
    cache.mkdir(parents=True, exist_ok=True)
    remove_leftovers(cache)
    count, known = len(pictures), (FORMAT, pictures.fingerprint, DataConfig.max_pixels)
    stores = {LOOKS: Store(cache, LOOKS, digest(*known), count, "uint8")}
    for tower in towers:
        key = digest(*known, tower.fingerprint, precision)
        stores |= {encoder: Store(cache, encoder, key, count, "float16") for encoder in tower.encoders}
    start, bad = min(store.done for store in stores.values()), dict(stores[LOOKS].bad)
    if start < count:
        left = [tower for tower in towers if any(stores[encoder].done < count for encoder in tower.encoders)]
        views = {tower.view: tower.preprocess() for tower in left}
        batches = DataLoader(_Decoded(pictures, views), batch_size, sampler=range(start, count), num_workers=workers)
        flushed, device = time.monotonic(), pick_device(device)
        with Bar("encoding", count, completed=start) as bar:
            for batch in batches:
                rows = batch["row"].tolist()
                bad |= {str(row): error for row, error in zip(rows, batch["error"], strict=True) if error}
                _refuse_too_many(bad, pictures)
                stop = rows[-1] + 1
                _write(batch, stop, stores, left, device, precision)
                if time.monotonic() - flushed >= FLUSH_SECONDS or stop == count:
                    for store in stores.values():
                        store.flush(stop, bad)
                    flushed = time.monotonic()
                bar.advance(len(rows))
    arrays = {name: open_array(store.path) for name, store in stores.items()}
    looks_of_all = arrays.pop(LOOKS)
    return Encoded(arrays, looks_of_all, {int(row): error for row, error in bad.items()}, count - start)


def _write(
    batch: dict[str, Any],
    stop: int,
    stores: dict[str, Store],
    towers: Sequence[Tower],
    device: torch.device,
    precision: Precision,
) -> None:
    """Write what the stores lack of one batch; `stop`: the number after its last picture."""
    start = int(batch["row"][0])
    if stores[LOOKS].done < stop:
        stores[LOOKS].write(start, batch["looks"].numpy())
    for tower in towers:
        for encoder in tower.encoders:
            if stores[encoder].done < stop:
                embeddings = tower.encode(encoder, batch["pixels"][tower.view], device, precision)
                stores[encoder].write(start, embeddings.numpy())


class _Decoded(Dataset):
    """A picture's number -> its looks and its pixels by view; those of a blank one, and the error, if it is bad."""

    def __init__(self, pictures: Pictures, views: dict[str, Callable]) -> None:
        self.pictures, self.views = pictures, views

    def __getitem__(self, row: int) -> dict[str, Any]:
        try:
            image, error = self.pictures.image(row), ""
        except BadImage as reason:
            image, error = Image.new("RGB", (64, 64)), str(reason)
        pixels = {view: transform(image) for view, transform in self.views.items()}
        return {"row": row, "error": error, "looks": looks(image), "pixels": pixels}


def _refuse_too_many(bad: dict[str, str], pictures: Pictures) -> None:
    if len(bad) > MAX_BAD * len(pictures):
        first = [f"{pictures.names[int(row)]} ({error})" for row, error in list(bad.items())[:3]]
        raise DataError(
            f"{len(bad)} of {len(pictures)} pictures cannot be read, first: {'; '.join(first)}. Is this "
            "the right folder? Repair or remove them."
        )
