"""k-means of a stage's embeddings, and the labels accumulated over the stages (CLIP-MoE paper, section 3.1)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from threadpoolctl import threadpool_limits

from ..config import ClusterConfig
from ..data.arrays import load_arrays, save_arrays


@dataclass
class StageClusters:
    """Clusters of one stage: `labels` [rows] are the combinations k_image * y_text + y_image."""

    labels: np.ndarray
    image_centroids: np.ndarray
    text_centroids: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each combined cluster."""
        return np.bincount(self.labels, minlength=len(self.image_centroids) * len(self.text_centroids))

    def save(self, path: Path) -> None:
        save_arrays(path, **vars(self), sizes=self.sizes)

    @classmethod
    def load(cls, path: Path) -> StageClusters:
        arrays = load_arrays(path)
        return cls(arrays["labels"], arrays["image_centroids"], arrays["text_centroids"])


def cluster_stage(image: np.ndarray, text: np.ndarray, config: ClusterConfig, seed: int) -> StageClusters:
    """k-means of image [N,P] and text [N,P] embeddings (L2-normalised), one row an image."""
    if len(image) < max(config.image_clusters, config.text_clusters):
        raise ValueError(
            f"{len(image)} images cannot make {config.image_clusters} x {config.text_clusters} clusters: "
            "lower --clusters.image-clusters and --clusters.text-clusters, or use more data."
        )
    image_labels, image_centroids = _kmeans(image, config.image_clusters, config, seed)
    text_labels, text_centroids = _kmeans(text, config.text_clusters, config, seed + 1)
    return StageClusters(config.image_clusters * text_labels + image_labels, image_centroids, text_centroids)


def _kmeans(x: np.ndarray, k: int, config: ClusterConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    # One thread: sums in another order give other labels, and the same run must give the same labels again.
    with threadpool_limits(1):
        model = MiniBatchKMeans(k, random_state=seed, batch_size=config.batch_size, n_init=config.n_init)
        labels = model.fit_predict(np.asarray(x, dtype=np.float32))
    return labels.astype(np.int64), model.cluster_centers_.astype(np.float32)


@dataclass
class NestedClusters:
    """ICCL's clusters (CLIP-FMoE): `labels` [rows] of the first level, `sub_labels` [rows] within each of them."""

    labels: np.ndarray
    sub_labels: np.ndarray

    def save(self, path: Path) -> None:
        save_arrays(path, **vars(self))

    @classmethod
    def load(cls, path: Path) -> NestedClusters:
        return cls(**load_arrays(path))


def nested_clusters(
    image: np.ndarray, clusters: int, sub_clusters: int, config: ClusterConfig, seed: int
) -> NestedClusters:
    """k-means of image embeddings [N,P] into `clusters`, and of each of these into at most `sub_clusters` (from one
    start, whatever `config.n_init`)."""
    if len(image) < clusters:
        raise ValueError(f"{len(image)} images cannot make {clusters} clusters: use more data, or fewer experts.")
    labels, _ = _kmeans(image, clusters, config, seed)
    # For many small clusters one start is as good as three (0.2% in distance) and takes a third of the time.
    config = dataclasses.replace(config, n_init=1)
    sub_labels = np.zeros_like(labels)
    for cluster in range(clusters):
        mine = np.flatnonzero(labels == cluster)
        if len(mine):
            sub_labels[mine] = _kmeans(image[mine], min(sub_clusters, len(mine)), config, seed + 1 + cluster)[0]
    return NestedClusters(labels, sub_labels)


def accumulate(stages: list[StageClusters]) -> np.ndarray:
    """Cluster ids of every row [N,S]: column s is its cluster of stage s.

    The paper's accumulated label is this row read as a number: yhat <- 9*yhat + y.
    """
    return np.stack([stage.labels for stage in stages], axis=1)
