"""Embeddings on disk: arrays that several processes fill, memory-mapped, and that survive a killed run.

A folder of features holds `image.npy` [N,P], `text.npy` [M,P], `text_image.npy` [M], `rows.npy` [N], while it is being
made a `progress-RANK.json` of every process, and when it is whole `features.json`. A chunk of rows is written and
flushed BEFORE the progress file names it, so a killed run repeats at most one chunk a process.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_clipmoe.files import SaveError, read_json, remove_leftovers, write_json

from ..data.arrays import array_fits, create_array, open_array, write_rows

DONE = "features.json"
KINDS = ("image", "text")
Chunks = list[tuple[int, int]]
"""Ranges of rows: first, and one past the last."""


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of a data set, L2-normalised, read from disk as they are used.

    image [N,P]; text [M,P]; text_image [M]: the row of `image` that a caption belongs to; rows [N]: the source's
    number of each image.
    """

    image: np.ndarray
    text: np.ndarray
    text_image: np.ndarray
    rows: np.ndarray


class FeatureFolder:
    """The files of one encoding: process 0 creates them, and every process writes its own share of rows.

    key: names the model, data and settings. counts: rows of each kind. width: P.
    """

    def __init__(
        self, path: Path, key: str, counts: dict[str, int], width: int, dtype: str, rank: int, world: int
    ) -> None:
        self.path, self.key, self.counts, self.rank, self.world = path, key, counts, rank, world
        self.dtype, self.shapes = np.dtype(dtype), {kind: (counts[kind], width) for kind in KINDS}
        self.progress = path / f"progress-{rank}.json"
        self.mine: dict[str, list[list[int]]] = {kind: [] for kind in KINDS}

    def array(self, kind: str) -> Path:
        return self.path / f"{kind}.npy"

    @property
    def complete(self) -> bool:
        done = self.path / DONE
        return done.exists() and read_json(done).get("key") == self.key and self._arrays_fit()

    def _arrays_fit(self) -> bool:
        return all(array_fits(self.array(kind), self.dtype, self.shapes[kind]) for kind in KINDS)

    def prepare(self, text_image: np.ndarray, rows: np.ndarray) -> None:
        """Keep what an earlier run of the same work finished, or start over. Process 0 only."""
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        progress = list(self.path.glob("progress-*.json"))
        if self._arrays_fit() and progress and all(_read_progress(p).get("key") == self.key for p in progress):
            return
        for stale in [self.path / DONE, *progress]:  # first of all: arrays without them count for nothing
            stale.unlink(missing_ok=True)
        try:
            np.save(self.path / "text_image.npy", text_image)
            np.save(self.path / "rows.npy", rows)
            for kind, shape in self.shapes.items():
                create_array(self.array(kind), self.dtype, shape)
        except OSError as error:
            raise _no_space(self.path, error) from error

    def left_to_do(self, size: int) -> tuple[dict[str, Chunks], int]:
        """-> (chunks of `size` rows of this process's contiguous share that nobody has written yet, by kind; how many
        rows of the share are written)."""
        written = {kind: np.zeros(count, bool) for kind, count in self.counts.items()}
        for path in self.path.glob("progress-*.json"):
            content = _read_progress(path)
            if content.get("key") == self.key:
                for kind in KINDS:
                    for start, stop in content[kind]:
                        written[kind][start:stop] = True
                if path == self.progress:
                    self.mine = {kind: content[kind] for kind in KINDS}
        left, done = {}, 0
        for kind, count in self.counts.items():
            begin, end = count * self.rank // self.world, count * (self.rank + 1) // self.world
            chunks = [(start, min(start + size, end)) for start in range(begin, end, size)]
            left[kind] = [(start, stop) for start, stop in chunks if not written[kind][start:stop].all()]
            done += end - begin - sum(stop - start for start, stop in left[kind])
        return left, done

    def write(self, kind: str, start: int, embeddings: torch.Tensor) -> None:
        """Write the rows from `start` on: to the disk first, then into the progress file."""
        try:
            write_rows(self.array(kind), start, embeddings.numpy(), durable=True)
        except OSError as error:
            raise _no_space(self.path, error) from error
        self.mine[kind].append([start, start + len(embeddings)])
        write_json(self.progress, {"key": self.key, **self.mine})

    def finish(self, facts: dict[str, Any]) -> None:
        """Mark the folder as whole, then remove the progress files. Process 0 only."""
        write_json(self.path / DONE, {"key": self.key, **facts})
        self.drop_progress()

    def drop_progress(self) -> None:
        for path in self.path.glob("progress-*.json"):
            path.unlink()


def _read_progress(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError):  # it cannot be trusted, so its rows are made again
        return {}


def _no_space(path: Path, error: OSError) -> SaveError:
    return SaveError(
        f"could not write features to {path}: {error}. What was finished is kept: free some space and run the same "
        "command again."
    )


def open_embeddings(folder: str | Path) -> Embeddings:
    """Open a whole folder of features, memory-mapped. Raises FileNotFoundError when it is not whole."""
    folder = Path(folder)
    if not (folder / DONE).exists():
        raise FileNotFoundError(f"{folder} holds no finished features ({DONE} is missing): run the encoding again.")
    names = [field.name for field in dataclasses.fields(Embeddings)]
    return Embeddings(*(open_array(folder / f"{name}.npy") for name in names))
