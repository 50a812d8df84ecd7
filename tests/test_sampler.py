"""The batches of a stage: every row used, all of a batch from one cluster where that is possible."""

import numpy as np
import pytest

from train_encoder.training.sampler import InClusterBatchSampler, plan_epoch


def paths_of(rows: int, stages: int, clusters: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, clusters, (rows, stages))


def test_a_batch_at_depth_s_shares_its_cluster_in_all_s_stages():
    paths = paths_of(2000, 3)
    plan = plan_epoch(paths, 16, seed=0, epoch=0)
    assert set(plan.depth) == {0, 1, 2, 3}
    for batch, depth in zip(plan.batches, plan.depth, strict=True):
        assert len({tuple(p) for p in paths[batch, :depth]}) == 1


def test_only_less_than_one_batch_of_rows_waits_for_the_next_epoch():
    paths = paths_of(1009, 3, clusters=9)
    plan = plan_epoch(paths, 50, seed=0, epoch=0)
    used = plan.batches.ravel()
    assert len(set(used)) == len(used) == 1000


def test_clusters_smaller_than_a_batch_back_off_to_their_parent():
    paths = np.array([[0, i % 10] for i in range(100)] + [[1, i % 10] for i in range(100)])
    plan = plan_epoch(paths, 50, seed=1, epoch=0)
    assert plan.depth.tolist() == [1, 1, 1, 1]  # ten rows a leaf: none fills a batch, the parents do


def test_rows_in_large_clusters_prefer_their_own_cluster():
    paths = np.repeat(np.arange(4), 64)[:, None]
    assert (plan_epoch(paths, 32, seed=0, epoch=0).depth == 1).all()


def test_a_plan_depends_on_seed_and_epoch_alone():
    paths = paths_of(500, 2)
    again = plan_epoch(paths, 32, seed=3, epoch=4)
    assert np.array_equal(plan_epoch(paths, 32, seed=3, epoch=4).batches, again.batches)
    assert not np.array_equal(plan_epoch(paths, 32, seed=3, epoch=5).batches, again.batches)
    assert not np.array_equal(plan_epoch(paths, 32, seed=4, epoch=4).batches, again.batches)


def test_processes_split_the_same_global_batch():
    paths = paths_of(300, 2)
    whole = list(InClusterBatchSampler(paths, 32, epochs=2, seed=0))
    halves = [list(InClusterBatchSampler(paths, 32, epochs=2, seed=0, rank=r, world=2)) for r in (0, 1)]
    assert whole == [a + b for a, b in zip(*halves, strict=True)]


def test_starting_in_mid_epoch_goes_on_with_the_same_batches():
    paths = paths_of(300, 2)
    whole = list(InClusterBatchSampler(paths, 32, epochs=2.5, seed=0))
    for start in (1, 8, 9, 13, len(whole)):
        assert list(InClusterBatchSampler(paths, 32, epochs=2.5, seed=0, start=start)) == whole[start:]


def test_epochs_see_different_batches_and_every_row_carries_its_epoch():
    batches = list(InClusterBatchSampler(paths_of(64, 1), 16, epochs=2, seed=0))
    assert [{epoch for _, epoch in batch} for batch in batches] == [{0}] * 4 + [{1}] * 4
    assert [{row for row, _ in b} for b in batches[:4]] != [{row for row, _ in b} for b in batches[4:]]


def test_without_clusters_batches_are_plain_shuffles():
    plan = plan_epoch(np.zeros((100, 0), dtype=int), 10, seed=0, epoch=0)
    assert sorted(plan.batches.ravel()) == list(range(100))
    assert plan.batches.ravel().tolist() != list(range(100))


def test_a_batch_larger_than_the_data_says_what_to_lower():
    with pytest.raises(ValueError, match=r"only 10 images.*global-batch-size"):
        InClusterBatchSampler(paths_of(10, 1), 16, epochs=1, seed=0)


def test_a_batch_that_does_not_divide_over_processes_says_which_would():
    with pytest.raises(ValueError, match=r"33 does not divide over 2 processes.*34"):
        InClusterBatchSampler(paths_of(100, 1), 33, epochs=1, seed=0, rank=0, world=2)
