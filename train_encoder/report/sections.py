"""The sections of a run's report: each takes a `Run` and gives what stands there, nothing where it is not known yet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llava_clipmoe.files import read_json

from ..evaluate.judge import ACCURACIES, COMPOSITION
from ..training.metrics import METRICS, read_metrics
from . import figures
from .document import Block, Figure, Table
from .numbers import MISSING, Score, best_of, duration, millions, percent, score

RETRIEVAL = {
    "i2t_r1": "image→text R@1",
    "i2t_r5": "R@5",
    "i2t_r10": "R@10",
    "t2i_r1": "text→image R@1",
    "t2i_r5": "R@5",
    "t2i_r10": "R@10",
}
RECALLS = {"i2t_r1": "I2T R@1", "t2i_r1": "T2I R@1", "i2t_r5": "I2T R@5", "t2i_r5": "T2I R@5"}
"""The four of a headline."""
TRIALS = {"i2t_r1": "images", "t2i_r1": "captions", "top1": "images"}
"""Score -> what it was measured on, for its standard error."""


@dataclass
class Run:
    """What a run directory holds; what could not be read is empty, with the reason in `problems`."""

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Training -> its logged steps."""
    done: list[dict[str, Any]] = field(default_factory=list)
    """Finished pieces of work."""
    problems: list[str] = field(default_factory=list)

    @property
    def final(self) -> str:
        """The result's name among the variants (runs older than the setting made a CLIP-MoE)."""
        return self.results.get("result", "clip-moe")

    def measured(self, name: str) -> Any:
        """A part of results.json; an empty one where it is absent."""
        return self.results.get(name) or {}

    def read(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        if not path.exists():
            self.problems.append(f"{name} is not there yet.")
            return {}
        try:
            return read_json(path)
        except ValueError as error:
            self.problems.append(f"{name} cannot be read: {error}")
            return {}


def load_run(directory: str | Path) -> Run:
    """Read a run directory. Raises NotADirectoryError when there is none; absent and damaged files are noted."""
    run = Run(Path(directory))
    if not run.directory.is_dir():
        raise NotADirectoryError(f"there is no run at {run.directory}: give the --output-dir of a train-encoder run.")
    run.config, run.results = run.read("config.json"), run.read("results.json")
    rows, unreadable = read_metrics(run.directory / METRICS)
    if not rows:
        run.problems.append(f"{METRICS} is not there yet, or is empty.")
    if unreadable:
        run.problems.append(f"{METRICS}: {unreadable} unreadable line(s) left out (a killed run tears its last line).")
    for row in rows:
        if row.get("event") == "done":
            run.done.append(row)
        elif "step" in row and "stage" in row:
            run.steps.setdefault(str(row["stage"]), []).append(row)
    return run


def _score_rows(variants: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> list[list[str | Score]]:
    """A row a variant, in the order in which the method evaluated them; the distance to the base below each score."""
    best = {key: best_of(scores.get(key) for scores in variants.values()) for key in keys}
    rows = []
    for name, scores in variants.items():
        base = {} if name == "base" else variants.get("base", {})
        trials = {key: scores.get(counted) for key, counted in TRIALS.items()}
        rows.append([name, *(score(scores.get(key), best[key], base.get(key), trials.get(key)) for key in keys)])
    return rows


def retrieval(run: Run) -> list[Block]:
    blocks: list[Block] = []
    for name, variants in run.measured("retrieval").items():
        first, tiles = next(iter(variants.values())), []
        if {"base", "clip-moe"} <= variants.keys():
            base, result = variants["base"], variants["clip-moe"]
            for key in ("i2t_r1", "t2i_r1"):
                change = f"{percent(base[key])} → {percent(result[key])}"
                tiles.append((f"{RETRIEVAL[key]}, base → CLIP-MoE", change))
        images, captions = first["images"], first["captions"]
        note = f"{images:,} images, {captions:,} captions; chance R@1 is {100 / images:.2g}%."
        rows = _score_rows(variants, list(RETRIEVAL))
        blocks.append(Table(["variant", *RETRIEVAL.values()], rows, name, note, tiles=tiles))
    how = (
        "R@k: the share of queries whose right answer is among the first k, in percent; bold is the best of a "
        "column, the small number below is the distance to the base. ± is one binomial standard error, "
        "√(p(1−p)/n), with n images for image→text and n captions for text→image; several captions of one image "
        "are not independent, which makes the ± of text→image too small where there are several. A difference "
        "below about twice its ± may be chance. stageK is the dense CLIP of a stage; expertK is the CLIP-MoE with "
        "all tokens sent to one expert, which should agree with stageK (expert0 with the base) up to rounding."
    )
    return [*blocks, how] if blocks else []


def classification(run: Run) -> list[Block]:
    tables: list[Block] = []
    for name, variants in run.measured("zero_shot").items():
        first = next(iter(variants.values()))
        note = f"{first['images']:,} images, {first['classes']:,} classes; chance is {100 / first['classes']:.2g}%."
        tables.append(Table(["variant", *ACCURACIES.values()], _score_rows(variants, list(ACCURACIES)), name, note))
    return tables


def composition(run: Run) -> list[Block]:
    blocks: list[Block] = []
    for name, variants in run.measured("composition").items():
        first = next(iter(variants.values()))
        keys = [key for key in COMPOSITION if key in first]
        rows = _score_rows(variants, keys)
        for row, scores in zip(rows, variants.values(), strict=True):
            row += [percent(kind["accuracy"]) for kind in scores["by_type"].values()]
        head = ["variant", *(COMPOSITION[key] for key in keys), *first["by_type"]]
        blocks.append(Table(head, rows, name, f"{first['pairs']:,} questions"))
    how = (
        "sugarcrepe: an image is closer to its own caption than to a wrong one, 50% by chance. winoground: of two "
        "images and two captions of the same words, each image finds its caption (text score) and each caption its "
        "image (image score), 25% by chance; right is both, 16.7%."
    )
    return [*blocks, how] if blocks else []


def attributes(run: Run) -> list[Block]:
    variants = run.measured("attributes")
    if not variants:
        return []
    first, rows = next(iter(variants.values())), []
    for name, one in first["by_type"].items():
        values = [entry["by_type"][name]["accuracy"] for entry in variants.values()]
        rows.append([name, _count(one["pairs"]), *(score(value, best_of(values)) for value in values)])
    values, total = [entry["overall"] for entry in variants.values()], first["pairs"]
    rows.append(["overall", _count(total), *(score(value, best_of(values), n=total) for value in values)])
    fewest = min(one["pairs"] for one in first["by_type"].values())
    return [
        "Pairs of images that a variant tells apart, in percent.",
        Table(["attribute", "pairs", *variants], rows),
        "Scored as MMVP-VLM is: a pair counts when both of its images are matched to their own statements; chance "
        "is 25%. Bold is the best of a row: experts that see different things are best in different rows. ± is one "
        f"binomial standard error. With {fewest} pairs an attribute's ± is up to {50 / math.sqrt(fewest):.0f} points.",
    ]


def _count(number: float | None) -> str:
    return f"{number:,}" if number else MISSING


def loss(run: Run) -> list[Block]:
    if not run.steps:
        return []
    panels: list[str] = []
    balance: list[str] = []
    for index, (stage, rows) in enumerate(run.steps.items()):
        contrastive = "contrastive" if any("contrastive" in row for row in rows) else "loss"
        for key, target, colour in ((contrastive, panels, 0), ("balance", balance, 1)):
            logged = [row for row in rows if row.get(key) is not None]
            if logged:
                steps, values = [row["step"] for row in logged], [float(row[key]) for row in logged]
                label = "loss" if key == "loss" else f"{key} loss"
                target.append(figures.curve(f"{key}{index}", stage, steps, values, label, colour))
    how = (
        "Contrastive loss of every training: thin is what was logged, bold its moving average over a twentieth of "
        "the curve. Lower is better within a panel only: a later stage's negatives come from one narrow cluster, "
        "so its loss starts higher and says nothing against it."
    )
    blocks: list[Block] = [Figure(panels, how)]
    if balance:
        how = (
            "Load-balance loss of the router training, averaged over the blocks: 1 when all experts are first "
            "choice equally often, the number of experts when one takes every token."
        )
        blocks.append(Figure(balance, how))
    losses = {stage: [float(row.get("loss") or 0) for row in rows] for stage, rows in run.steps.items()}
    diverged = [stage for stage, values in losses.items() if not np.isfinite(values).all()]
    if diverged:
        blocks.append(f"Steps whose loss was not finite (gaps in the curve): {', '.join(diverged)}.")
    return blocks


def _clusters(run: Run) -> list[dict[str, Any]]:
    """From results.json; before it is written, from clusters/stage*.npz (cluster ids accumulated as in training)."""
    if run.measured("clusters"):
        return run.results["clusters"]
    found, ids = [], []
    files = sorted((run.directory / "clusters").glob("stage*.npz"), key=lambda file: (len(file.name), file.name))
    for stage, path in enumerate(files, start=1):
        try:
            with np.load(path, allow_pickle=False) as archive:
                ids.append(archive["labels"])
        except (OSError, ValueError, KeyError) as error:
            run.problems.append(f"clusters/{path.name} cannot be read: {error}")
            break
        sizes = np.unique(np.stack(ids, axis=1), axis=0, return_counts=True)[1]
        found.append({"stage": stage, "sizes": sizes.tolist()})
    return found


def clusters(run: Run) -> list[Block]:
    found = [entry for entry in _clusters(run) if any(entry["sizes"])]
    if not found:
        return []
    batch = run.config.get("mcl", {}).get("optim", {}).get("global_batch_size")
    depths = sorted({int(depth) for entry in found for depth in entry.get("batches_by_depth") or {}}, reverse=True)
    panels, rows = [], []
    for index, entry in enumerate(found):
        sizes = np.asarray([size for size in entry["sizes"] if size > 0], dtype=np.int64)
        label = f"stage{entry['stage']}" if isinstance(entry["stage"], int) else entry["stage"]
        panels.append(figures.cluster_sizes(f"clusters{index}", label, sizes, batch))
        numbers = [f"{number:,}" for number in (len(sizes), sizes.min(), int(np.median(sizes)), sizes.max())]
        small = f"{100 * sizes[sizes < batch].sum() / sizes.sum():.1f}%" if batch else MISSING
        at = entry.get("batches_by_depth") or {}
        rows.append([label, *numbers, small, *(f"{at[str(d)]:,}" if str(d) in at else MISSING for d in depths)])
    head = ["stage", "clusters", "smallest", "median", "largest", "images in clusters below a batch"]
    return [
        Figure(
            panels,
            "Images in each cluster from which a stage draws its batches, largest first, on a log scale. What lies "
            "below the dashed line is smaller than one global batch.",
        ),
        Table([*head, *(f"batches at depth {depth}" for depth in depths)], rows),
        "Depth is how many stages of clusters all images of a batch share: a cluster smaller than a batch is "
        "filled up from the cluster that it came from, one depth less; depth 0 is the whole data set.",
    ]


def routing(run: Run) -> list[Block]:
    data = run.measured("routing")
    towers = {tower: data[tower] for tower in ("vision", "text") if data.get(tower)}
    if not towers:
        return []
    panels, notes = [], []
    for tower, shares in towers.items():
        experts = len(shares[0])
        blocks = data.get(f"{tower}_blocks") or range(len(shares))
        limits, label = (0, max(np.max(shares), 2 / experts)), f"routing shares, {tower}"
        panels.append(
            figures.heatmap(f"routing{tower}", tower, shares, blocks, range(experts), limits, "{:.0%}".format, label)
        )
        narrow = sum(max(row) > 0.8 for row in shares)
        notes.append(
            f"{tower}: {narrow} of {len(shares)} blocks give more than 80% of their tokens to one expert first; the "
            f"smallest share anywhere is {percent(min(map(min, shares)))}%."
        )
    even = 100 / len(next(iter(towers.values()))[0])
    how = (
        "Share of tokens whose first choice is an expert; a row is a block and adds to 100%. Even use would be "
        f"{even:.0f}% everywhere; expert 0 is the base, expert K comes from stage K."
    )
    return [Figure(panels, how), " ".join(notes)]


def movement(run: Run) -> list[Block]:
    routers = run.measured("router_movement")
    if not routers:
        return []
    titles = {
        "relative_change": "change of the weights, |W − W₀| / |W₀|",
        "changed_top1": "tokens with a new first expert",
    }
    panels, rows = [], []
    for key, title in titles.items():
        series: dict[str, tuple[list[int], list[float]]] = {}
        for entry in routers:
            tower, _, number = entry["block"].rpartition(".")
            blocks, values = series.setdefault(tower, ([], []))
            blocks.append(int(number))
            values.append(entry[key])
        panels.append(figures.lines_by_block(f"moved{key.replace('_', '')}", title, series))
    for entry in routers:
        change, changed = (f"{percent(entry[key])}%" for key in titles)
        rows.append([entry["block"], change, f"{entry['cosine']:.4f}", changed])
    how = (
        "How far training moved each router W from its start W₀, and how many tokens it sends to another "
        "expert for it. Lines near 0% mean that the routing is still the one it started with: by default a random one."
    )
    shown: list[Block] = [Figure(panels, how)]
    if stages := run.measured("ffn_change"):
        moved = ", ".join(f"{name} {percent(share)}%" for name, share in stages.items())
        shown.append(f"The experts themselves, all FFNs of a stage against the base's: {moved}.")
    head = ["block", "|W − W₀| / |W₀|", "cosine(W, W₀)", "tokens with a new first expert"]
    return [*shown, Table(head, rows, folded=f"All {len(rows)} routers")]


@dataclass
class _Work:
    seconds: float = 0.0
    images: int = 0
    memory: int = 0
    """Bytes, the peak."""

    def cells(self) -> list[str]:
        rate = f"{self.images / self.seconds:,.1f}" if self.images and self.seconds else MISSING
        memory = f"{self.memory / 2**30:.2f}" if self.memory else MISSING
        return [duration(self.seconds), _count(self.images), rate, memory]


def cost(run: Run) -> list[Block]:
    if not run.done:
        return []
    merged: dict[tuple[str, str], _Work] = {}
    for row in run.done:
        work = merged.setdefault((str(row.get("stage") or "whole run"), str(row.get("work", ""))), _Work())
        work.seconds += row.get("seconds") or 0
        work.images += row.get("images") or 0
        work.memory = max(work.memory, row.get("peak_memory_bytes") or 0)
    whole = _Work(sum(work.seconds for work in merged.values()), 0, max(work.memory for work in merged.values()))
    rows = [[stage, name, *work.cells()] for (stage, name), work in merged.items()]
    rows.append(["total", "", duration(whole.seconds), "", "", whole.cells()[-1]])
    unit, unit_name = (1, "seconds")
    if whole.seconds > 120:
        unit, unit_name = (3600, "hours") if whole.seconds > 7200 else (60, "minutes")
    stages = list(dict.fromkeys(stage for stage, _ in merged))
    names = list(dict.fromkeys(name for _, name in merged))
    times = {name: [merged.get((stage, name), _Work()).seconds / unit for stage in stages] for name in names}
    memory = [max(work.memory for key, work in merged.items() if key[0] == stage) / 2**30 for stage in stages]
    panels = [
        figures.stacked_bars("time", "time", stages, times, unit_name),
        figures.stacked_bars("memory", "peak memory", stages, {"peak": memory}, "GiB"),
    ]
    how = (
        "Time of each stage by the kind of work, and the most memory that any of its work needed: allocated on the "
        "GPU where there is one, else resident memory of the process."
    )
    return [
        Figure(panels, how),
        Table(["stage", "work", "time", "images", "images/s", "peak memory, GiB"], rows),
        "Memory is that of process 0. Work that was interrupted and done again counts once.",
    ]


def parameters(run: Run) -> list[Block]:
    counts = run.measured("parameters")
    labels = {"dense": "base (dense)", "active": "CLIP-MoE, used for one token", "total": "CLIP-MoE, all"}
    if not counts:
        return []
    rows = [[label, millions(counts[key]), f"{counts[key] / counts['dense']:.2f}×"] for key, label in labels.items()]
    return [Table(["parameters", "number", "to base"], rows)]
