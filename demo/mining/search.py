"""Blind pairs among N pictures: close for the dense CLIP, apart for the reference. Exact, in bounded memory.

    found = search(dense, [moe], Criteria(), device="cuda")     # dense, moe: [N,P], perhaps memory-mapped

All N(N-1)/2 dense cosines are computed, tile by tile; a reference cosine only where the dense one is above its
threshold. A `Pool` keeps the best of the pairs that are left. Of equal pairs the lower numbers win.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from train_encoder.evaluate.retrieval import full_precision
from train_encoder.features.encode import pick_device
from train_encoder.progress import Bar

TILE = 2048
"""Rows and columns of a tile: its cosines take 16 MB, and its product is large enough for full speed."""
PART = 2**18
"""Pairs handled at once: all of a tile may be above the threshold, and each step copies them."""
LOOSE = 8
"""The pool keeps this many times `per_image` pairs of each picture: when a picture's best pair is left out later, since
its partner is in better ones, others must be there to replace it."""


@dataclass(frozen=True)
class Criteria:
    dense_threshold: float = 0.95
    reference_threshold: float = 0.6
    top: int = 100
    per_image: int = 2
    candidates: int = 1000
    pool: int = 100_000
    """Pairs that the search remembers."""


@dataclass(frozen=True)
class Found:
    """The pairs kept, the widest gap first; n of them."""

    first: np.ndarray  # int64 [n]
    second: np.ndarray  # int64 [n], larger than `first`
    outcome: str
    """"both": all passed both thresholds. "dense": none did; the widest gaps above the dense threshold. "closest":
    none was above it; the widest gaps among the highest dense cosines."""
    above: int
    """Pairs above the dense threshold, near duplicates among them."""
    forgotten: bool
    """The pool was too small for all pairs, so that a pair of a picture in very many pairs may be missing."""


Rows = Callable[[slice | np.ndarray], torch.Tensor]
"""Positions among the compared pictures -> their embeddings [n,P], L2-normalised, fp32 on the device."""


def _normalised(array: np.ndarray, numbers: np.ndarray, device: torch.device, some: slice | np.ndarray) -> torch.Tensor:
    part = torch.from_numpy(np.asarray(array[numbers[some]]))
    return F.normalize(part.to(device, torch.float32), dim=-1)


def cosines(rows: Rows, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosines of n pairs of one tile, fp32 [n], by one product of the rows and columns that occur in them."""
    a, i = _occurring(first)
    b, j = _occurring(second)
    return (rows(a) @ rows(b).T).cpu().numpy()[i, j]


def _occurring(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As np.unique with the inverse, but without a sort: the numbers are a tile's and so lie close together."""
    low = numbers.min()
    there = np.bincount(numbers - low) > 0
    return there.nonzero()[0] + low, (np.cumsum(there) - 1)[numbers - low]


def exact_cosines(array: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosines of n pairs in fp64 [n], each of its two rows alone."""
    found = np.empty(len(first))
    for start in range(0, len(first), TILE):
        some = slice(start, start + TILE)
        a, b = array[first[some]].astype(np.float64), array[second[some]].astype(np.float64)
        found[some] = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return found


class Pool:
    """The `keep` pairs with the largest keys, and at most `per_row` of a row. Holds 2 * keep at most, ever."""

    def __init__(self, count: int, keep: int, per_row: int) -> None:
        self.keep, self.per_row, self.size = keep, per_row, 0
        self.pairs, self.keys = np.empty((2, 2 * keep), np.int64), np.empty(2 * keep, np.float64)
        self.floor = -np.inf
        self.floors = np.full(count, -np.inf)  # by row: the key that a pair of it must exceed

    @property
    def full(self) -> bool:
        """Whether a pair has been forgotten."""
        return bool(self.floor > -np.inf or (self.floors > -np.inf).any())

    def add(self, first: np.ndarray, second: np.ndarray, keys: np.ndarray) -> None:
        while len(keys):
            some = keys > np.maximum(self.floor, np.maximum(self.floors[first], self.floors[second]))
            first, second, keys = first[some], second[some], keys[some]
            n = min(len(keys), 2 * self.keep - self.size)
            place = slice(self.size, self.size + n)
            self.pairs[:, place], self.keys[place] = (first[:n], second[:n]), keys[:n]
            self.size += n
            first, second, keys = first[n:], second[n:], keys[n:]
            if self.size == 2 * self.keep:
                self._shrink()

    def sorted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """first, second, keys: the largest key first, then the lower numbers."""
        first, second, keys = *self.pairs[:, : self.size], self.keys[: self.size]
        order = np.lexsort((second, first, -keys))
        return first[order], second[order], keys[order]

    def _shrink(self) -> None:
        first, second, keys = self.sorted()
        kept = np.ones(len(keys), bool)
        rows = np.stack([first, second], 1).reshape(-1)  # in the order of the keys
        order = np.argsort(rows, kind="stable")
        starts = np.flatnonzero(np.diff(rows[order], prepend=-1))
        rank = np.arange(len(rows)) - np.repeat(starts, np.diff([*starts, len(rows)]))
        last = order[rank == self.per_row - 1]
        self.floors[rows[last]] = np.maximum(self.floors[rows[last]], keys[last // 2])
        kept[order[rank >= self.per_row] // 2] = False
        kept = np.flatnonzero(kept)
        if len(kept) > self.keep:
            kept = kept[: self.keep]
            self.floor = keys[kept[-1]]
        self.size = len(kept)
        self.pairs[:, : self.size], self.keys[: self.size] = (first[kept], second[kept]), keys[kept]


def close_pairs(
    rows: Rows, count: int, above: Callable[[], float], advance: Callable[[int], None]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """first, second, cosine of all pairs above a threshold, tile by tile of the upper triangle, PART at a time. `above`
    gives the threshold of a tile; `advance` is told how many pairs have been looked at."""
    for i in range(0, count, TILE):
        a = rows(slice(i, i + TILE))
        for j in range(i, count, TILE):
            tile = a @ rows(slice(j, j + TILE)).T
            mask = tile > above()
            if i == j:
                mask = mask.triu_(1)
            for found, values in zip(mask.nonzero().split(PART), tile[mask].split(PART), strict=True):
                if len(found):
                    first, second = found.T.cpu().numpy()
                    yield i + first, j + second, values.cpu().numpy()
            advance(len(a) * (len(a) - 1) // 2 if i == j else tile.numel())


def search(
    dense: np.ndarray,
    references: Sequence[np.ndarray],
    criteria: Criteria,
    *,
    numbers: np.ndarray | None = None,
    accept: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    device: str = "auto",
) -> Found:
    """The blind pairs of N pictures. dense [N,P]; references: [N,P'] each, the smallest of their cosines counts.

    `numbers`: the pictures to compare (default all), ascending. `accept`: numbers of n first and n second pictures ->
    bool [n], which pairs may be kept. Where no pair passes both thresholds, the widest gaps of those above the dense
    one are kept; where none is above it, the widest gaps of the `candidates` closest.
    """
    numbers = np.arange(len(dense)) if numbers is None else np.asarray(numbers, np.int64)
    count, place = len(numbers), pick_device(device)

    def accepted(first: np.ndarray, second: np.ndarray, cosine: np.ndarray) -> tuple[np.ndarray, ...]:
        good = slice(None) if accept is None else accept(numbers[first], numbers[second])
        return first[good], second[good], cosine[good]

    rows, *others = (partial(_normalised, array, numbers, place) for array in (dense, *references))
    above = 0
    pool = Pool(count, criteria.pool, LOOSE * criteria.per_image)
    with torch.inference_mode(), full_precision():
        with Bar("comparing", count * (count - 1) // 2, unit="pairs") as bar:
            for pairs in close_pairs(rows, count, lambda: criteria.dense_threshold, bar.advance):
                above += len(pairs[0])
                first, second, cosine = accepted(*pairs)
                if len(first):
                    reference = np.min([cosines(other, first, second) for other in others], axis=0)
                    # Pairs that pass get keys above 2, more than any gap: a wider gap alone does not push them out.
                    passed = reference < criteria.reference_threshold
                    pool.add(first, second, cosine.astype(np.float64) - reference + 4 * passed)
        first, second, keys = pool.sorted()
        outcome = "closest" if not len(keys) else "both" if keys[0] > 2 else "dense"
        if outcome == "both":
            first, second = first[keys > 2], second[keys > 2]
        if outcome == "closest":
            first, second = _closest(rows, count, criteria.candidates, accepted)
    # By fp64 cosines: those of a matrix product differ in the last bit with the tile they were in.
    first, second = numbers[first], numbers[second]
    reference = np.min([exact_cosines(array, first, second) for array in references], axis=0)
    order = np.lexsort((second, first, reference - exact_cosines(dense, first, second)))
    first, second = first[order], second[order]
    kept = _few_of_each(first, second, criteria.per_image, criteria.top)
    return Found(first[kept], second[kept], outcome, above, forgotten=pool.full and len(kept) < criteria.top)


def _closest(rows: Rows, count: int, candidates: int, accepted: Callable) -> tuple[np.ndarray, np.ndarray]:
    """The pairs with the highest dense cosines, in a second pass: only for where no pair is above the threshold."""
    pool = Pool(count, candidates, per_row=count)
    with Bar("comparing again", count * (count - 1) // 2, unit="pairs") as bar:
        for pairs in close_pairs(rows, count, lambda: max(pool.floor, -2.0), bar.advance):
            pool.add(*accepted(*pairs))
    first, second, _ = pool.sorted()
    return first[:candidates], second[:candidates]


def _few_of_each(first: np.ndarray, second: np.ndarray, per_image: int, top: int) -> list[int]:
    """Positions of the first `top` pairs, without those whose pictures are in `per_image` earlier pairs already."""
    uses: Counter[int] = Counter()
    kept: list[int] = []
    for position, pair in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        if len(kept) < top and all(uses[image] < per_image for image in pair):
            kept.append(position)
            uses.update(pair)
    return kept
