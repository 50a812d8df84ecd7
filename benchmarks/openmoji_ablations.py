"""Why DMU scores what it scores on the scenes: one thing of its recipe changed at a time, on a comparison's own bases.

    llava-clipmoe compare all --seeds 3 --jobs 2 --output-dir runs/compare
    python benchmarks/openmoji_ablations.py --comparison runs/compare --jobs 2      (resumes)

Every run starts from the base that the comparison trained with that seed, and spends as many epochs. The first table is
the share of attribute pairs that are right, the second the mean of three scores on held-out scenes: attribute pairs,
retrieval (R@1, both ways) and what the base could (nouns and colours). All in percent.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timing
import tyro

from llava_clipmoe.files import read_json, write_text
from llava_clipmoe.processes import Children, end_of
from train_encoder.report.run import mean_score

VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "previous": ("each stage goes on from the one before it", ("--mcl.start-from", "previous")),
    "random": ("no hard negatives: one cluster, batches at random", (
        "--clusters.image-clusters", "1", "--clusters.text-clusters", "1")),
    "clusters-2x2": ("2 x 2 clusters a stage, so that they fill a batch longer", (
        "--clusters.image-clusters", "2", "--clusters.text-clusters", "2")),
    "router-long": ("routers train on the stages' captions alone", ("--moe.caption-columns", "long")),
    "short-stages": ("stages of 2 epochs (3), router 7 (4)", ("--mcl.optim.epochs", "2", "--moe.optim.epochs", "7")),
    "slow-stages": ("stages' learning rate 5e-4 (1e-3)", ("--mcl.optim.learning-rate", "5e-4")),
    "fast-stages": ("stages' learning rate 2e-3 (1e-3)", ("--mcl.optim.learning-rate", "2e-3")),
    "slow-router": ("router's learning rate 1e-3 (1e-2)", ("--moe.optim.learning-rate", "1e-3")),
}  # fmt: skip
"""Name of the folder -> in words, and flags for train-encoder."""
BESIDE = ("base", "direct-ft", "direct-ft-all", "sparse-upcycling")
"""Recipes of the comparison that are listed for reference, where it has them."""


@dataclass(frozen=True)
class Settings:
    comparison: Path = Path("runs/compare")
    """A finished comparison on OpenMoji: its bases, and its scores for reference."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: int = 3
    jobs: int = 1
    runs: Path = Path("runs/ablations")
    output: Path | None = None
    """Write the table to this file."""


def folder_of(runs: Path, name: str, seed: int) -> Path:
    """Where a run lies, and (as the comparison names its own) the comparison's."""
    return runs / f"{name}-seed{seed}"


def make(s: Settings, children: Children, name: str, seed: int) -> None:
    """One run; nothing where it is finished."""
    folder = folder_of(s.runs, name, seed)
    if (folder / "results.json").exists():
        return
    base = (folder_of(s.comparison, "base-openmoji", seed) / "base").resolve()
    words = [sys.executable, "-m", "llava_clipmoe.cli", "train-encoder", "dmu-openmoji", "--seed", str(seed),
             "--base.source", str(base), "--output-dir", str(folder), *VARIANTS[name][1]]  # fmt: skip
    print(f"{name}, seed {seed} (log: {folder}.log)", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(folder.name + ".log")
    if children.run(words, log=log):
        raise ChildProcessError(f"{name}, seed {seed} failed; the end of {log}:\n{end_of(log)}")


def pair_score(result: dict, system: str) -> float:
    """Share of attribute pairs that are right."""
    return result["attributes"][system]["overall"]


def mean_and_spread(values: list[float]) -> str:
    """Of shares, in percent."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} ± {100 * spread:.2f}"


Score = Callable[[dict, str], float]


def row(name: str, runs: list[dict[str, Any]], against: list[dict[str, Any]], score: Score) -> list[str]:
    """Scores of one system over the seeds, and of the parts of a CLIP-MoE. against: another system's runs, by seed."""
    scores = [score(one, one["result"]) for one in runs]
    gaps = [mine - score(other, other["result"]) for mine, other in zip(scores, against, strict=True)]
    parts = [
        f"{100 * statistics.mean(score(one, part) for one in runs):.2f}" if part in runs[0]["attributes"] else ""
        for part in ("expert1", "expert2", "expert3", "clip-moe (untrained router)")
    ]
    by_seed = " ".join(f"{100 * score:.1f}" for score in scores)
    return [name, mean_and_spread(scores), by_seed, mean_and_spread(gaps), *parts]


def main() -> None:
    s = tyro.cli(Settings, description=__doc__, use_underscores=False)
    children = Children()
    works = [partial(make, s, children, name, seed) for name in s.variants for seed in range(s.seeds)]
    children.run_all(works, at_once=s.jobs)

    def results(runs: Path, name: str) -> list[dict[str, Any]]:
        return [read_json(folder_of(runs, name, seed) / "results.json") for seed in range(s.seeds)]

    beside = [name for name in (*BESIDE, "dmu") if folder_of(s.comparison, f"{name}-openmoji", 0).is_dir()]
    known = {name: results(s.comparison, f"{name}-openmoji") for name in beside}
    known |= {f"dmu: {VARIANTS[name][0]}": results(s.runs, name) for name in s.variants}
    columns = ("system", "mean", "by seed", "minus direct-ft", "expert 1", "expert 2", "expert 3", "untrained router")
    text = timing.command(__file__, None)
    for title, score in (("Attribute pairs", pair_score), ("Mean of three scores", mean_score)):
        rows = [row(name, runs, known["direct-ft"], score) for name, runs in known.items()]
        text += f"\n\n**{title}**\n\n{timing.markdown(columns, rows)}"
    print(text)
    if s.output is not None:
        write_text(s.output, text + "\n")


if __name__ == "__main__":
    main()
