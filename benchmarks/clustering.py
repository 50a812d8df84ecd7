"""DMU's clustering against ICCL's on the same features: the time of each, and how tight the clusters are.

    python benchmarks/clustering.py --features runs/quickstart/features --output benchmarks/clustering.md
    python benchmarks/clustering.py --rows 100000 --width 768

DMU clusters images and captions of every stage (E-1 of them) into 3 and 3; ICCL clusters the base's images once, into 4
and each of these into 64. Runs are interleaved and timed in CPU seconds of their one thread, which other work on the
machine changes little, after a small one that is not counted (it warms up scikit-learn); medians.
"""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from llava_clipmoe.files import write_text
from train_encoder.config import ClusterConfig
from train_encoder.features.clusters import cluster_stage, nested_clusters
from train_encoder.features.store import open_embeddings

Features = list[tuple[np.ndarray, np.ndarray]]
"""(images [N,P], captions [N,P]) of every stage's model, the base first."""


@dataclass(frozen=True)
class Settings:
    features: Path | None = None
    """A run's features/, with one folder a stage; made up when absent."""
    rows: int = 100_000
    """Of made-up features."""
    width: int = 768
    stages: int = 3
    """Stages that DMU clusters for."""
    experts: int = 4
    sub_clusters: int = 64
    repeats: int = 5
    output: Path | None = None
    """Append the table to this file."""


def main() -> None:
    s = tyro.cli(Settings, description=__doc__, use_underscores=False)
    stages = read(s) if s.features else make_up(s)
    config = ClusterConfig()
    works: dict[str, Callable[[], object]] = {
        "DMU: images and captions of every stage": lambda: [
            cluster_stage(image, text, config, 2 * number) for number, (image, text) in enumerate(stages)
        ],
        "DMU: one stage of them": lambda: cluster_stage(*stages[0], config, 0),
        "ICCL: images of the base, both levels": lambda: iccl(s, stages, config),
        "ICCL: its first level alone": lambda: nested_clusters(stages[0][0], s.experts, 1, config, 0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    cluster_stage(*(x[:1000] for x in stages[0]), config, 0)  # warms scikit-learn up
    for _ in range(s.repeats):
        for name, work in works.items():
            started = time.process_time()
            work()
            seconds[name].append(time.process_time() - started)
            print(f"{name}: {seconds[name][-1]:.3f} s", file=sys.stderr, flush=True)
    text = table(s, stages, seconds)
    print(text)
    if s.output is not None:
        before = s.output.read_text() + "\n" if s.output.exists() else ""
        write_text(s.output, before + text)


def iccl(s: Settings, stages: Features, config: ClusterConfig):
    return nested_clusters(stages[0][0], s.experts, s.sub_clusters, config, 0)


def read(s: Settings) -> Features:
    """The stages' features of a run; later stages are the base's where the run has fewer."""
    folders = [s.features / "base", *(s.features / f"stage{number}" for number in range(1, s.stages))]
    found = [open_embeddings(folder) for folder in folders if folder.exists()]
    if not found:
        raise SystemExit(
            f"{s.features} holds no features: a finished run of compare drops them, train-encoder does not."
        )
    return [(np.asarray(one.image), np.asarray(one.text)) for one in found]


def make_up(s: Settings) -> Features:
    """Unit vectors around 200 centres, fp16 as a run stores them; another draw for every stage and kind."""
    rng = np.random.default_rng(0)

    def draw() -> np.ndarray:
        centres = rng.standard_normal((200, s.width), dtype=np.float32)
        x = centres[rng.integers(0, 200, s.rows)] + rng.standard_normal((s.rows, s.width), dtype=np.float32)
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)

    return [(draw(), draw()) for _ in range(s.stages)]


def inertia(x: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance to the centre of the own cluster."""
    x = x.astype(np.float32)
    return float(sum(((x[labels == k] - x[labels == k].mean(0)) ** 2).sum() for k in np.unique(labels)) / len(x))


def table(s: Settings, stages: Features, seconds: dict[str, list[float]]) -> str:
    image = stages[0][0]
    found = iccl(s, stages, ClusterConfig())
    both = s.sub_clusters * found.labels + found.sub_labels
    sizes = np.unique(both, return_counts=True)[1]
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    dmu, fmoe = (next(v for name, v in middle.items() if name.startswith(kind)) for kind in ("DMU", "ICCL"))
    lines = [
        f"Command: `python {shlex.join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])}`", "",
        f"**DMU : ICCL = {dmu / fmoe:.2f}** (the CLIP-FMoE paper: 4.15) on {len(image):,} rows of {image.shape[1]}, "
        f"{len(stages)} stages, one thread, median of {s.repeats}", "",
        "| what | CPU seconds | all runs |", "|---|---|---|",
    ]  # fmt: skip
    for name, values in seconds.items():
        lines.append(f"| {name} | {middle[name]:.3f} | {', '.join(f'{value:.3f}' for value in sorted(values))} |")
    lines += ["", f"ICCL's {len(sizes)} sub-clusters hold {sizes.min()} to {sizes.max()} images, median "
              f"{int(np.median(sizes))}; mean squared distance to the centre {inertia(image, both):.4f}."]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
