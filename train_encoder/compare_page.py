"""What a comparison says: the papers' tables from the runs of several recipes, mean and spread over seeds."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig
from llava_clipmoe.files import read_json
from llava_clipmoe.model_directory import read_config

from .config import TrainConfig
from .page import duration
from .progress import METRICS, read_metrics

RETRIEVAL = {"I2T R@1": "i2t_r1", "T2I R@1": "t2i_r1", "I2T R@5": "i2t_r5", "T2I R@5": "t2i_r5"}


@dataclass(frozen=True)
class Cost:
    """What a run spent after its base."""

    steps: int
    samples: int
    train_seconds: float
    other_seconds: dict[str, float]
    """features, clusters, ... by the kind of work."""
    peak_memory: int
    """Bytes."""


@dataclass(frozen=True)
class Cell:
    """One finished run."""

    results: dict[str, Any]
    cost: Cost
    inference_macs: int
    """Multiply-accumulates of the result's vision tower for one image."""

    @property
    def final(self) -> str:
        """The result's name among the systems."""
        return self.results["result"]


def epochs_of(config: TrainConfig) -> float:
    """Passes over the data after the base, in all trainings together. 0 for the base alone."""
    by_method = {
        "dmu": (config.moe.num_experts - 1) * config.mcl.optim.epochs + config.moe.optim.epochs,
        "vanilla-moe": (config.moe.num_experts - 1) * config.mcl.optim.epochs + config.moe.optim.epochs,
        "fmoe": config.fmoe.optim.epochs + config.moe.optim.epochs,  # an expert passes over its own cluster
        "sparse-upcycling": config.moe.optim.epochs,
        "finetune": config.finetune.optim.epochs,
        "base": 0.0,
    }
    return by_method[config.method]


# ------------------------------------------------------------------------------------------------------------- reading


def read_cell(folder: Path) -> Cell:
    """A finished run's scores and costs. Raises FileNotFoundError when it is not finished."""
    rows, _ = read_metrics(folder / METRICS)
    result = next(path for path in (folder / "clip-moe", folder / "clip", folder / "base") if path.exists())
    return Cell(read_json(folder / "results.json"), cost_of(rows), vision_macs(read_config(result)))


def cost_of(rows: Sequence[Mapping[str, Any]]) -> Cost:
    """From the lines of metrics.jsonl; the base's own training counts nowhere."""
    done = [row for row in rows if row.get("event") == "done" and row.get("work") != "evaluate"]
    own = [row for row in done if not (row["work"] == "train" and row["stage"] == "base")]
    other: dict[str, float] = {}
    for row in own:
        if row["work"] != "train":
            other[row["work"]] = other.get(row["work"], 0.0) + row["seconds"]
    steps = {row["stage"]: row["steps"] for row in rows if "step" in row and row.get("stage") != "base"}
    trained = [row for row in own if row["work"] == "train"]
    return Cost(
        steps=sum(steps.values()),
        samples=sum(row["images"] for row in trained),
        train_seconds=sum(row["seconds"] for row in trained),
        other_seconds=other,
        peak_memory=max((row["peak_memory_bytes"] for row in own), default=0),
    )


def vision_macs(config: CLIPMoEConfig) -> int:
    """Multiply-accumulates of the vision tower for one image: patches, attention, FFNs, routers, gates."""
    v = config.vision_config
    d, h, t = v.hidden_size, v.intermediate_size, v.num_patches + 1
    attention = 4 * d * d + 2 * t * d  # projections; scores and their sum
    ffn = 2 * d * h
    moe = len(v.moe_layers)
    sparse = v.num_experts_per_tok * ffn + v.num_experts * d + (ffn + d * d if v.fusion_gate else 0)
    patches = v.num_patches * v.num_channels * v.patch_size**2 * d
    return patches + t * (v.num_hidden_layers * attention + (v.num_hidden_layers - moe) * ffn + moe * sparse)


# ---------------------------------------------------------------------------------------------------------------- page


def compare_page(cells: Mapping[str, Sequence[Cell]], command: Sequence[str]) -> str:
    """The whole page; `cells` by recipe, the base first."""
    seeds = len(next(iter(cells.values())))
    lines = [
        "# Comparison of recipes", "", f"Command: `{shlex.join(command)}`", "",
        f"Mean ± standard deviation over {seeds} seed{'s' if seeds > 1 else ''}, in percent. Every recipe starts from "
        "the same converged base of its seed and spends as many epochs on the same captions.", "",
    ]  # fmt: skip
    lines += retrieval_tables(cells) + attribute_table(cells) + routing_table(cells) + cost_table(cells)
    return "\n".join(lines).rstrip() + "\n"


def retrieval_tables(cells: Mapping[str, Sequence[Cell]]) -> list[str]:
    """Retrieval of every recipe's result (Tables 2, 4 and 6 of the CLIP-MoE paper), a table a data set."""
    lines = ["## Retrieval", ""]
    for name, systems in next(iter(cells.values()))[0].results["retrieval"].items():
        one = next(iter(systems.values()))
        lines += [f"**{name}** ({one['images']} pictures, {one['captions']} captions)", ""]
        columns = {
            title: {recipe: [c.results["retrieval"][name][c.final][key] for c in run] for recipe, run in cells.items()}
            for title, key in RETRIEVAL.items()
        }
        columns["mean"] = {
            recipe: [statistics.mean(values) for values in zip(*(columns[t][recipe] for t in RETRIEVAL), strict=True)]
            for recipe in cells
        }
        lines += [*_table(cells, columns), ""]
    return lines


def attribute_table(cells: Mapping[str, Sequence[Cell]]) -> list[str]:
    """Attribute pairs (Table 1): every recipe's result, then each expert alone."""
    if not any(cell.results.get("attributes") for run in cells.values() for cell in run):
        return []
    first = next(iter(cells.values()))[0]
    kinds = list(first.results["attributes"][first.final]["by_type"])
    lines = ["## Attribute pairs", "", "A pair counts when both of its pictures are matched right: chance is 25.", ""]
    rows: dict[str, list[dict]] = {}
    for recipe, run in cells.items():
        rows[recipe] = [cell.results["attributes"][cell.final] for cell in run]
        experts = [name for name in run[0].results["attributes"] if name.startswith("expert")]
        rows |= {f"{recipe}: {name}": [cell.results["attributes"][name] for cell in run] for name in experts}
    columns = {"all": {row: [found["overall"] for found in values] for row, values in rows.items()}}
    for kind in kinds:
        columns[kind] = {
            row: [found["by_type"].get(kind, {"accuracy": 0.0})["accuracy"] for found in values]
            for row, values in rows.items()
        }
    return [*lines, *_table(rows, columns), ""]


def routing_table(cells: Mapping[str, Sequence[Cell]]) -> list[str]:
    """First choices of the vision tower's tokens by expert, averaged over its MoE blocks (Figure 2 as numbers)."""
    routed = {recipe: run for recipe, run in cells.items() if run[0].results.get("routing")}
    if not routed:
        return []
    most = max(len(run[0].results["routing"]["vision"][0]) for run in routed.values())
    lines = ["## Routing", "", "Share of the pictures' tokens whose first choice is an expert, over all blocks.", ""]
    lines += ["| recipe | " + " | ".join(f"expert {e}" for e in range(most)) + " |", "|---" * (most + 1) + "|"]
    for recipe, run in routed.items():
        shares = [
            [statistics.mean(block) for block in zip(*cell.results["routing"]["vision"], strict=True)] for cell in run
        ]
        values = [_mean_and_spread(list(share)) for share in zip(*shares, strict=True)]
        lines.append(f"| {recipe} | " + " | ".join([*values, *["–"] * (most - len(values))]) + " |")
    return [*lines, ""]


def cost_table(cells: Mapping[str, Sequence[Cell]]) -> list[str]:
    """Training cost, parameters and inference cost (as the CLIP-FMoE page counts them)."""
    head = ["recipe", "steps", "samples", "training", "features", "clusters", "all", "peak memory", "parameters",
            "active", "vision MACs an image"]  # fmt: skip
    lines = ["## Cost", "", "Everything after the base, mean over seeds; evaluation is not counted.", ""]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for recipe, run in cells.items():
        costs = [cell.cost for cell in run]
        kinds = [statistics.mean(c.other_seconds.get(kind, 0.0) for c in costs) for kind in ("features", "clusters")]
        training = statistics.mean(c.train_seconds for c in costs)
        parameters = run[0].results["parameters"]
        lines.append("| " + " | ".join([
            recipe, f"{costs[0].steps:,}", f"{costs[0].samples:,}", duration(training), *map(duration, kinds),
            duration(training + sum(kinds)), f"{max(c.peak_memory for c in costs) / 2**30:.2f} GiB",
            f"{parameters['total'] / 1e6:.2f} M", f"{parameters['active'] / 1e6:.2f} M",
            f"{run[0].inference_macs / 1e9:.3f} G",
        ]) + " |")  # fmt: skip
    return [*lines, ""]


def _table(rows: Mapping[str, Any], columns: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Mean and spread; the best mean of a column in bold."""
    best = {title: max(statistics.mean(values) for values in column.values()) for title, column in columns.items()}
    lines = ["| recipe | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = []
        for title, column in columns.items():
            text = _mean_and_spread(column[row])
            cells.append(f"**{text}**" if statistics.mean(column[row]) == best[title] else text)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def _mean_and_spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{100 * values[0]:.1f}"
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"
