"""The tables of a comparison, in the layout of the papers' tables; Markdown and HTML are made from the same rows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .compare_cells import Cells
from .compare_summary import cost_sentence, fmoe_claims, sentence
from .page import duration
from .sections import CLASSES

RETRIEVAL = {"I2T R@1": "i2t_r1", "T2I R@1": "t2i_r1", "I2T R@5": "i2t_r5", "T2I R@5": "t2i_r5"}
CLUSTERING_NOTE = (
    "Small data is clustered in a fraction of a second, and loading scikit-learn (about a second, once a run) may be "
    "most of it; `benchmarks/clustering.md` times the clusterings alone."
)
Scores = dict[str, list[float]]
"""Recipe (or another row) -> its values by seed."""


@dataclass(frozen=True)
class Table:
    """Text cells, `**bold**` as in Markdown; `scores` is the column that the summary and the figures speak of."""

    head: list[str]
    rows: list[list[str]]
    title: str = ""
    note: str = ""
    scores: Scores = field(default_factory=dict)

    def markdown(self) -> list[str]:
        head = [f"**{self.title}**{f' ({self.note})' if self.note else ''}", ""] if self.title else []
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (self.head, *self.rows)]
        return [*head, lines[0], "|---" * len(self.head) + "|", *lines[1:], ""]


@dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    intro: str
    tables: list[Table]
    after: str = ""

    def markdown(self) -> list[str]:
        lines = [f"## {self.title}", "", *([self.intro, ""] if self.intro else [])]
        for table in self.tables:
            lines += table.markdown()
        return [*lines, *([self.after, ""] if self.after else [])]


def score_table(columns: Mapping[str, Scores], title: str = "", note: str = "", summed_up: str = "mean") -> Table:
    """A row a recipe, mean and spread, the best mean of a column in bold; `summed_up`: the column of `scores`."""
    best = {name: max(statistics.mean(values) for values in column.values()) for name, column in columns.items()}
    rows = []
    for row in next(iter(columns.values())):
        cells = []
        for name, column in columns.items():
            text = mean_and_spread(column[row])
            cells.append(f"**{text}**" if statistics.mean(column[row]) == best[name] else text)
        rows.append([row, *cells])
    return Table(["recipe", *columns], rows, title, note, dict(columns[summed_up]))


def mean_and_spread(values: Sequence[float]) -> str:
    """In percent."""
    if len(values) == 1:
        return f"{100 * values[0]:.1f}"
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


# ------------------------------------------------------------------------------------------------------- the sections


def sections(cells: Cells) -> list[Section]:
    """Every section that there is something for, in the order of the page."""
    made = (make(cells) for make in (retrieval, classification, attributes, routing, cost))
    return [section for section in made if section is not None]


def summary(cells: Cells, found: Sequence[Section]) -> list[str]:
    """Three to five sentences: who is first where, by how much, and whether that is more than the spread."""
    base, said = next(iter(cells)), []
    for section in found:
        if section.anchor in ("retrieval", "classification"):
            tables = [table for table in section.tables if len(table.scores) > 1]
            said += [sentence(f"{section.title}, {table.title}", table.scores, base) for table in tables[:2]]
        elif section.anchor == "attributes":
            own = {recipe: section.tables[0].scores[recipe] for recipe in cells}
            said += [sentence(section.title, own, base)] if len(own) > 1 else []
    spent = cost_sentence(cells)
    return [*said[:4], *([spent] if spent else [])]


def retrieval(cells: Cells) -> Section | None:
    """Every recipe's result (Tables 2, 4 and 6 of the CLIP-MoE paper), a table a data set."""
    tables = []
    for name in _in_all(cells, "retrieval"):
        one = next(iter(cells.values()))[0].retrieval(name)
        columns: dict[str, Scores] = {
            title: {recipe: [cell.retrieval(name)[key] for cell in run] for recipe, run in cells.items()}
            for title, key in RETRIEVAL.items()
        }
        columns["mean"] = {
            recipe: [statistics.mean(values) for values in zip(*(columns[t][recipe] for t in RETRIEVAL), strict=True)]
            for recipe in cells
        }
        tables.append(score_table(columns, name, f"{one['images']} pictures, {one['captions']} captions"))
    return Section("retrieval", "Retrieval", "", tables) if tables else None


def classification(cells: Cells) -> Section | None:
    """Zero-shot classification of every recipe's result (Table 5)."""
    tables = []
    for name in _in_all(cells, "zero_shot"):
        columns: dict[str, Scores] = {
            title: {recipe: [cell.results["zero_shot"][name][cell.final][key] for cell in run]
                    for recipe, run in cells.items()}
            for key, title in CLASSES.items()
        }  # fmt: skip
        one = next(iter(cells.values()))[0]
        counts = one.results["zero_shot"][name][one.final]
        note = f"{counts['images']} pictures, {counts['classes']} classes"
        tables.append(score_table(columns, name, note, summed_up="top-1"))
    return Section("classification", "Zero-shot classification", "", tables) if tables else None


def attributes(cells: Cells) -> Section | None:
    """Attribute pairs (Table 1): every recipe's result, then each expert alone."""
    if not all(cell.results.get("attributes") for run in cells.values() for cell in run):
        return None
    first = next(iter(cells.values()))[0]
    kinds = list(first.results["attributes"][first.final]["by_type"])
    found: dict[str, list[dict[str, Any]]] = {}
    for recipe, run in cells.items():
        found[recipe] = [cell.results["attributes"][cell.final] for cell in run]
        experts = [name for name in run[0].results["attributes"] if name.startswith("expert")]
        found |= {f"{recipe}: {name}": [cell.results["attributes"][name] for cell in run] for name in experts}
    columns = {"all": {row: [score["overall"] for score in values] for row, values in found.items()}}
    for kind in kinds:
        columns[kind] = {row: [score["by_type"][kind]["accuracy"] for score in values] for row, values in found.items()}
    intro = "A pair counts when both of its pictures are matched right: chance is 25."
    return Section("attributes", "Attribute pairs", intro, [score_table(columns, summed_up="all")])


def routing(cells: Cells) -> Section | None:
    """First choices of the vision tower's tokens by expert, averaged over its MoE blocks (Figure 2 as numbers)."""
    shares = routing_shares(cells)
    if not shares:
        return None
    most = max(map(len, shares.values()))
    rows = []
    for recipe, experts in shares.items():
        values = [mean_and_spread(share) for share in experts]
        rows.append([recipe, *values, *["–"] * (most - len(values))])
    intro = "Share of the pictures' tokens whose first choice is an expert, over all blocks."
    return Section("routing", "Routing", intro, [Table(["recipe", *(f"expert {e}" for e in range(most))], rows)])


def routing_shares(cells: Cells) -> dict[str, list[list[float]]]:
    """Recipe -> for each expert its share by seed; only recipes whose result is a mixture."""
    found = {}
    for recipe, run in cells.items():
        if all(cell.results.get("routing") for cell in run):
            by_seed = [[statistics.mean(block) for block in zip(*cell.results["routing"]["vision"], strict=True)]
                       for cell in run]  # fmt: skip
            found[recipe] = [list(expert) for expert in zip(*by_seed, strict=True)]
    return found


def cost(cells: Cells) -> Section:
    """Training cost, parameters and inference cost (as the CLIP-FMoE page counts them)."""
    head = ["recipe", "steps", "samples", "training", "features", "clusters", "all", "training TFLOPs", "peak memory",
            "parameters", "active", "vision MACs an image"]  # fmt: skip
    rows = []
    for recipe, run in cells.items():
        costs = [cell.cost for cell in run]
        kinds = [statistics.mean(c.other_seconds.get(kind, 0.0) for c in costs) for kind in ("features", "clusters")]
        parameters = run[0].results["parameters"]
        rows.append([
            recipe, f"{costs[0].steps:,}", f"{costs[0].samples:,}", _time([c.train_seconds for c in costs]),
            *map(duration, kinds), _time([c.seconds for c in costs]),
            f"{statistics.mean(cell.flops for cell in run) / 1e12:,.1f}",
            f"{max(c.peak_memory for c in costs) / 2**30:.2f} GiB",
            f"{parameters['total'] / 1e6:.2f} M", f"{parameters['active'] / 1e6:.2f} M",
            f"{run[0].inference_macs / 1e9:.3f} G",
        ])  # fmt: skip
    tables, claims = [Table(head, rows)], fmoe_claims(cells)
    if claims:
        tables.append(Table(["", "here", "paper"], claims, "CLIP-FMoE against CLIP-MoE", "by seed"))
    return Section("cost", "Cost", _cost_intro(cells), tables, CLUSTERING_NOTE if claims else "")


def _cost_intro(cells: Cells) -> str:
    tokens = [cell.tokens for run in cells.values() for cell in run if cell.tokens is not None]
    how = "Everything after the base, mean over seeds; evaluation is not counted. Times are a CPU's own where a run " \
          "used nothing else, else the clock's. TFLOPs: 10¹² operations of a run, forward and backward through what " \
          "needs a gradient, features included"  # fmt: skip
    if not tokens:
        return f"{how}."
    if not all(one.measured for one in tokens):
        return f"{how}; captions at the text tower's whole context, as the data could not be read for their lengths."
    return f"{how}; captions at {tokens[0].padded:.0f} tokens, the mean length of a padded batch."


def _time(seconds: Sequence[float]) -> str:
    spread = f" ± {duration(statistics.stdev(seconds))}" if len(seconds) > 1 and any(seconds) else ""
    return duration(statistics.mean(seconds)) + spread


def _in_all(cells: Cells, kind: str) -> list[str]:
    """Names of the data sets that every cell's result was measured on."""
    every = [{name for name, systems in (cell.results.get(kind) or {}).items() if cell.final in systems}
             for run in cells.values() for cell in run]  # fmt: skip
    first = next(iter(cells.values()))[0].results.get(kind) or {}
    return [name for name in first if all(name in one for one in every)]
