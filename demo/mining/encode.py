"""Encode pictures once by every encoder; what is encoded stays on disk for the next run.

    towers = open_towers("runs/quickstart/base", "runs/quickstart/clip-moe", "clip-moe")
    encoded = encode_pictures(pictures, towers, Path("runs/pairs/cache"))
    encoded.embeddings["dense"]          # [N,P] fp16, memory-mapped; a skipped picture's row is 0

`train_encoder.features` encodes a source by ONE model, with captions, and would decode every picture once a model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llava_clipmoe.files import remove_leftovers
from train_encoder.config import digest
from train_encoder.data.decode import BadImage
from train_encoder.data.pairs import DataError
from train_encoder.features.encode import Precision, pick_device
from train_encoder.progress import Bar

from .duplicates import looks
from .encoders import Tower
from .images import Pictures
from .store import Store

FORMAT = 1
"""Raise it when the same models and pictures give other numbers."""
FLUSH_SECONDS = 10.0
"""A killed run repeats at most this much work."""
MAX_BAD = 0.5
"""Share of unreadable pictures that stops the run: it is the wrong folder, or a broken disk."""


@dataclass(frozen=True)
class Encoded:
    """Embeddings of N pictures, N rows each, memory-mapped. A skipped picture has a row of zeros."""

    embeddings: dict[str, np.ndarray]
    """By encoder."""
    looks: np.ndarray
    bad: dict[int, str]
    """Why a picture was skipped."""
    encoded: int
    """Pictures that were decoded by this run: 0 where all came from the cache."""


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

    Other pictures, weights or precision have another key there, so that nothing stale is read; the batch size is no
    part of the key. Raises DataError when over half of the pictures cannot be read, NotFinite, SaveError (what is done
    is kept).
    """
    cache.mkdir(parents=True, exist_ok=True)
    remove_leftovers(cache)
    count, known = len(pictures), (FORMAT, pictures.fingerprint, pictures.max_pixels)
    looks_store = Store(cache, "looks", digest(*known), count, "uint8")
    stores = {
        encoder: Store(cache, encoder, digest(*known, tower.fingerprint, precision), count, "float16")
        for tower in towers
        for encoder in tower.encoders
    }
    start = min(store.done for store in (looks_store, *stores.values()))
    bad = dict(looks_store.state["bad"])
    if start < count:
        left = [tower for tower in towers if any(stores[encoder].done < count for encoder in tower.encoders)]
        work = _Encoding(pictures, left, stores, looks_store, bad, pick_device(device), precision)
        work.run(start, batch_size, workers)
    arrays = {encoder: store.array() for encoder, store in stores.items()}
    return Encoded(arrays, looks_store.array(), {int(row): error for row, error in bad.items()}, count - start)


@dataclass
class _Encoding:
    """One pass over the pictures that are not in every store yet."""

    pictures: Pictures
    towers: Sequence[Tower]
    stores: dict[str, Store]
    looks: Store
    bad: dict[str, str]
    device: torch.device
    precision: Precision

    def run(self, start: int, batch_size: int, workers: int) -> None:
        """Encode the pictures from number `start` on."""
        count, flushed = len(self.pictures), time.monotonic()
        views = {tower.view: tower.preprocess() for tower in self.towers}
        batches = DataLoader(
            _Decoded(self.pictures, views),
            batch_size,
            sampler=range(start, count),
            num_workers=workers,
            collate_fn=_collate,
        )
        with Bar("encoding", count, completed=start) as bar:
            for batch in batches:
                stop = self._batch(batch)
                if time.monotonic() - flushed >= FLUSH_SECONDS or stop == count:
                    for store in (*self.stores.values(), self.looks):
                        store.flush(stop, self.bad)
                    flushed = time.monotonic()
                bar.advance(len(batch["rows"]))

    def _batch(self, batch: dict[str, Any]) -> int:
        """Write what the stores lack of one batch; -> the number after its last picture."""
        begin, stop, good = int(batch["rows"][0]), int(batch["rows"][-1]) + 1, batch["good"]
        self.bad.update(batch["bad"])
        _refuse_too_many(self.bad, self.pictures)
        if not good.any():
            return stop
        for tower in self.towers:
            for encoder in tower.encoders:
                if stop > self.stores[encoder].done:
                    found = tower.encode(encoder, batch["pixels"][tower.view], self.device, self.precision)
                    self.stores[encoder].write(begin, _spread(found.numpy(), good))
        if stop > self.looks.done:
            self.looks.write(begin, _spread(batch["looks"], good))
        return stop


class _Decoded(Dataset):
    """A picture's number -> its looks, and its pixels by view, or the error. Runs in the loader's workers."""

    def __init__(self, pictures: Pictures, views: dict[str, Callable]) -> None:
        self.pictures, self.views = pictures, views

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            image = self.pictures.image(i)
        except BadImage as error:
            return {"row": i, "error": str(error)}
        return {"row": i, "looks": looks(image), "pixels": {view: make(image) for view, make in self.views.items()}}


def _collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack in the worker: a batch then travels as a few tensors and not as hundreds."""
    good = [item for item in items if "error" not in item]
    views = good[0]["pixels"] if good else ()
    return {
        "rows": np.array([item["row"] for item in items]),
        "good": np.array(["error" not in item for item in items]),
        "bad": {str(item["row"]): item["error"] for item in items if "error" in item},
        "looks": np.stack([item["looks"] for item in good]) if good else None,
        "pixels": {view: torch.stack([item["pixels"][view] for item in good]) for view in views},
    }


def _spread(values: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Rows of the good pictures -> rows of all, 0 for the others."""
    rows = np.zeros((len(good), values.shape[1]), values.dtype)
    rows[good] = values
    return rows


def _refuse_too_many(bad: dict[str, str], pictures: Pictures) -> None:
    if len(bad) > MAX_BAD * len(pictures):
        first = [f"{pictures.names[int(row)]} ({error})" for row, error in list(bad.items())[:3]]
        raise DataError(
            f"{len(bad)} of {len(pictures)} pictures cannot be read, first: {'; '.join(first)}. Is this "
            "the right folder? Repair or remove them."
        )
