"""Which images make up each global batch: in-cluster batches with back-off, or plain shuffled ones.

A plan is a pure function of (labels, batch size, seed, epoch): identical on every process, and resumable in
mid-epoch by its step number alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass
class EpochPlan:
    batches: np.ndarray  # [steps, global batch] row numbers
    depth: np.ndarray  # [steps] how many stages of clusters the rows of a batch share (0: drawn from everything)


def plan_epoch(cluster_ids: np.ndarray, batch_size: int, seed: int, epoch: int) -> EpochPlan:
    """Batches of one epoch, each from one accumulated cluster where that is large enough.

    cluster_ids [N,S]: a row's cluster in every stage ([N,0] for plain shuffled batches); rows with the same first s of
    them share a cluster of depth s. Rows that do not fill a batch in their cluster go up to its parent (one stage
    fewer), and so on to the root; fewer than a batch are left there, for the next epoch. (The official code drops what
    does not fill a batch in its own cluster: 20-35% of the samples at stage 3.)
    """
    rows = len(cluster_ids)
    if rows < batch_size:
        raise ValueError(
            f"the global batch is {batch_size}, but there are only {rows} images: lower the global batch size of "
            "this training (for example --mcl.optim.global-batch-size), or use more data."
        )
    rng = np.random.default_rng([seed, epoch])
    waiting = rng.permutation(rows)
    batches, depths = [], []
    for depth in range(cluster_ids.shape[1], -1, -1):
        left_over = []
        for members in _groups(waiting, cluster_ids[:, :depth]):
            full = len(members) // batch_size * batch_size
            batches += list(members[:full].reshape(-1, batch_size))
            depths += [depth] * (full // batch_size)
            left_over.append(members[full:])
        waiting = np.concatenate(left_over) if left_over else waiting[:0]
        waiting = rng.permutation(waiting)
    order = rng.permutation(len(batches))
    return EpochPlan(np.stack(batches)[order], np.asarray(depths)[order])


def _groups(rows: np.ndarray, cluster_ids: np.ndarray) -> Iterator[np.ndarray]:
    """Split `rows` by their cluster ids, in the ids' order, keeping the order of rows within a group."""
    if not len(rows):
        return
    if cluster_ids.shape[1] == 0:
        yield rows
        return
    _, group = np.unique(cluster_ids[rows], axis=0, return_inverse=True)
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")
    yield from np.split(rows[order], np.flatnonzero(np.diff(group[order])) + 1)


class InClusterBatchSampler:
    """Yields this process's share of every global batch as a list of (row, epoch), from step `start` on.

    cluster_ids [N,S] as in `plan_epoch`; epochs may be a fraction; rows [N]: other names of the rows 0 to N-1.
    """

    def __init__(
        self,
        cluster_ids: np.ndarray,
        batch_size: int,
        epochs: float,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        rows: np.ndarray | None = None,
    ):
        if batch_size % world:
            raise ValueError(
                f"the global batch of {batch_size} does not divide over {world} processes: "
                f"use a multiple of {world}, for example {-(-batch_size // world) * world}."
            )
        self.cluster_ids, self.batch_size, self.seed, self.start = cluster_ids, batch_size, seed, start
        self.rows = np.arange(len(cluster_ids)) if rows is None else rows
        self.share = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.steps_per_epoch = len(cluster_ids) // batch_size
        if not self.steps_per_epoch:
            plan_epoch(cluster_ids, batch_size, seed, 0)  # raises the error that explains
        self.steps = max(1, round(epochs * self.steps_per_epoch))

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan, planned = None, -1
        for step in range(self.start, self.steps):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != planned:
                plan, planned = plan_epoch(self.cluster_ids, self.batch_size, self.seed, epoch), epoch
            yield [(int(row), epoch) for row in self.rows[plan.batches[within][self.share]]]
