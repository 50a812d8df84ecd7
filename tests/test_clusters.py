"""k-means of a stage and the accumulated labels."""

import numpy as np
import pytest

from train_encoder.config import ClusterConfig
from train_encoder.features.clusters import StageClusters, accumulate, cluster_stage


def blobs(centres: np.ndarray, each: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (
        np.repeat(centres, each, axis=0) + 0.01 * rng.standard_normal((len(centres) * each, centres.shape[1]))
    ).astype(np.float32)


def test_nine_combined_clusters_are_three_by_three():
    image = np.tile(blobs(np.eye(3, 8), 30), (3, 1))
    text = np.repeat(blobs(np.eye(3, 8), 1), 90, axis=0)
    found = cluster_stage(image, text, ClusterConfig(), seed=0)
    assert found.sizes.tolist() == [30] * 9
    # y = 3 * y_text + y_image: rows of one text cluster share labels // 3, of one image cluster labels % 3
    assert len(set(found.labels[:90] // 3)) == 1
    assert len(set(found.labels[:30] % 3)) == 1 and len(set(found.labels[90:120] % 3)) == 1


def test_the_same_seed_gives_the_same_labels():
    x = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float32)
    first = cluster_stage(x, x[::-1], ClusterConfig(), seed=5)
    assert np.array_equal(first.labels, cluster_stage(x, x[::-1], ClusterConfig(), seed=5).labels)


def test_accumulated_labels_follow_the_papers_recursion():
    x = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    stages = [cluster_stage(x, x[::-1], ClusterConfig(), seed=s) for s in range(3)]
    paths = accumulate(stages)
    number = np.zeros(400, dtype=np.int64)
    for stage in stages:
        number = 9 * number + stage.labels  # yhat <- 9 * yhat + y
    same_number = number[:, None] == number[None]
    same_path = (paths[:, None] == paths[None]).all(-1)
    assert np.array_equal(same_number, same_path)


def test_saved_clusters_come_back(tmp_path):
    x = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
    clusters = cluster_stage(x, x, ClusterConfig(2, 4), seed=0)
    clusters.save(tmp_path / "stage0.npz")
    again = StageClusters.load(tmp_path / "stage0.npz")
    assert np.array_equal(clusters.labels, again.labels) and np.array_equal(clusters.sizes, again.sizes)
    assert again.image_centroids.shape == (2, 8) and again.text_centroids.shape == (4, 8)


def test_fewer_images_than_clusters_says_what_to_lower():
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match=r"2 images.*clusters.image-clusters"):
        cluster_stage(x, x, ClusterConfig(), seed=0)
