"""The page of a comparison: a summary, the tables in the layout of the papers', and figures below them."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..evaluate.judge import ACCURACIES, COMPOSITION
from ..report.document import Code, Document, Figure, Section, Table
from ..report.figures import cost_against_score, scores_with_errors, stacked_bars
from ..report.numbers import MISSING, Score, duration, millions
from ..report.sections import RECALLS
from .llava import Results, llava_section
from .papers import TABLE_1_SOURCE, expert_figures, published
from .runs import Cell, Cells
from .summary import Scores, ScoreTable, fmoe_claims, summary

CLUSTERING_NOTE = (
    "Small data is clustered in a fraction of a second, and loading scikit-learn (about a second, once a run) may be "
    "most of it; `benchmarks/clustering.md` times the clusterings alone."
)

CONTROL = ": random router (control)"
"""Behind a mixture's name, the row of its experts under routers that nobody trained."""


def make_page(cells: Cells, llavas: Mapping[str, Results], command: Sequence[str]) -> Document:
    """cells: recipe -> its runs by seed, the base first (none: LLaVAs alone)."""
    makers = (retrieval, classification, composition, attributes, routing, cost) if cells else ()
    found = [section for make in makers if (section := make(cells)) is not None]
    last = [llava_section(llavas)] if llavas else []
    last.append(Section("reproduce", "Reproduce", [Code(shlex.join(command))]))
    if not cells:
        return Document("Comparison of LLaVAs", "", last)
    seeds = len(next(iter(cells.values())))
    lead = (
        f"Mean ± standard deviation over {seeds} seed{'s' if seeds > 1 else ''}, in percent. Every recipe starts from "
        "the same base of its seed and spends as many epochs on the same captions. A mixture's control is the same "
        "experts under random routers that were never trained: what is above it, the routing has learnt."
    )
    return Document("Comparison of recipes", lead, [*found, *last], summary(cells, found))


# -------------------------------------------------------------------------------------------------------------- scores


def by_seed(cells: Cells, read: Callable[[Cell], Any]) -> dict[str, list[Any]]:
    return {recipe: [read(cell) for cell in run] for recipe, run in cells.items()}


def with_controls(cells: Cells, read: Callable[[Cell, str], Any]) -> dict[str, list[Any]]:
    """What `read(cell, variant)` gives of every recipe's result by seed and, below a mixture, of its control."""
    rows = {}
    for recipe, run in cells.items():
        rows[recipe] = [read(cell, cell.final) for cell in run]
        if all(cell.control for cell in run):
            rows[recipe + CONTROL] = [read(cell, cell.control) for cell in run]
    return rows


Beside = Mapping[str, Mapping[str, float]]
"""Column -> row -> a paper's figure, in percent."""


def score_table(
    columns: Mapping[str, Scores], summed_up: str, title: str = "", note: str = "", beside: Beside | None = None
) -> ScoreTable:
    """A row a recipe, the best mean of a column in bold; `summed_up`: the column of `scores`. beside: in brackets."""
    beside = beside or {}
    best = {name: max(map(statistics.mean, column.values())) for name, column in columns.items()}
    rows = []
    for recipe in columns[summed_up]:
        row: list[str | Score] = [recipe]
        for name, column in columns.items():
            values, paper = column[recipe], beside.get(name, {}).get(recipe)
            text = mean_and_spread(values) + ("" if paper is None else f" [{paper:.1f}]")
            row.append(Score(text, best=statistics.mean(values) == best[name]))
        rows.append(row)
    return ScoreTable(["recipe", *columns], rows, title, note, scores=dict(columns[summed_up]))


def score_tables(
    cells: Cells, kind: str, titles: Mapping[str, str], counted: str, with_mean: bool = False
) -> list[ScoreTable]:
    """A table of every data set that all were measured on. titles: score -> column. counted: besides the pictures."""
    every = [cell for run in cells.values() for cell in run]
    tables = []
    for name in every[0].results.get(kind) or {}:
        if not all(cell.has(kind, name) for cell in every):
            continue
        found = with_controls(cells, lambda cell, variant, name=name: cell.scores(kind, name, variant))
        columns = {
            title: {recipe: [scores[key] for scores in seeds] for recipe, seeds in found.items()}
            for key, title in titles.items()
        }
        if with_mean:
            columns["mean"] = mean_of(list(columns.values()))
        counts = next(iter(found.values()))[0]
        note, beside = f"{counts['images']} pictures, {counts[counted]} {counted}", {}
        if paper := published(kind, name, counts["images"]):
            note = f"{note}; in brackets: {paper.source}"
            for key, title in titles.items():
                beside[title] = {recipe: scores[key] for recipe, scores in paper.scores.items() if key in scores}
        tables.append(score_table(columns, "mean" if with_mean else next(iter(columns)), name, note, beside))
    return tables


def mean_and_spread(values: Sequence[float]) -> str:
    """In percent."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def mean_of(columns: Sequence[Scores]) -> Scores:
    """The mean of several columns, row by row and seed by seed."""
    rows = columns[0] if columns else {}
    return {row: [statistics.mean(seed) for seed in zip(*(c[row] for c in columns), strict=True)] for row in rows}


def _with_figure(
    anchor: str, title: str, tables: Sequence[ScoreTable], cells: Cells, intro: Sequence[str] = ()
) -> Section | None:
    """The tables and a figure of each; None where there are none."""
    if not tables:
        return None
    panels = []
    for number, table in enumerate(tables):
        scores = {recipe: table.scores[recipe] for recipe in cells}
        panels.append(scores_with_errors(f"{anchor}{number}", table.title or title, scores))
    how = (
        "A dot is the mean over seeds, small dots are the seeds, the line is ± one standard deviation; the dashed "
        "line is the base."
    )
    return Section(anchor, title, [*intro, *tables, Figure(panels, how)])


# ------------------------------------------------------------------------------------------------------------ sections


def retrieval(cells: Cells) -> Section | None:
    """Every recipe's result (Tables 2, 4 and 6 of the CLIP-MoE paper), a table a data set."""
    return _with_figure("retrieval", "Retrieval", retrieval_tables(cells), cells)


def retrieval_tables(cells: Cells) -> list[ScoreTable]:
    return score_tables(cells, "retrieval", RECALLS, "captions", with_mean=True)


def classification(cells: Cells) -> Section | None:
    """Zero-shot classification of every recipe's result (Table 5)."""
    tables = score_tables(cells, "zero_shot", ACCURACIES, "classes")
    return _with_figure("classification", "Zero-shot classification", tables, cells)


def attributes(cells: Cells) -> Section | None:
    """Attribute pairs (Table 1): every recipe's result, then each expert alone."""
    if not all(cell.results.get("attributes") for run in cells.values() for cell in run):
        return None
    found: dict[str, list[dict[str, Any]]] = {}
    for recipe, run in cells.items():
        found |= with_controls({recipe: run}, lambda cell, variant: cell.results["attributes"][variant])
        for name in run[0].results["attributes"]:
            if name.startswith("expert"):
                found[f"{recipe}: {name}"] = [cell.results["attributes"][name] for cell in run]
    columns = {"all": {row: [scores["overall"] for scores in seeds] for row, seeds in found.items()}}
    for kind in next(iter(found.values()))[0]["by_type"]:
        columns[kind] = {row: [one["by_type"][kind]["accuracy"] for one in seeds] for row, seeds in found.items()}
    intro = "A pair counts when both of its pictures are matched right: chance is 25."
    beside: dict[str, dict[str, float]] = {}
    for kind, figures in expert_figures(next(iter(found.values()))[0]).items():
        beside[kind] = {f"dmu: expert{expert}": figure for expert, figure in enumerate(figures)}
    if beside and "dmu" in cells:
        intro = f"{intro} In brackets: {TABLE_1_SOURCE}."
    return _with_figure("attributes", "Attribute pairs", [score_table(columns, "all", beside=beside)], cells, [intro])


def composition(cells: Cells) -> Section | None:
    """Captions that differ little (SugarCrepe, Winoground): every recipe's result, by kind."""
    every, tables = [cell for run in cells.values() for cell in run], []
    for name in every[0].results.get("composition") or {}:
        if all(cell.has("composition", name) for cell in every):
            found = with_controls(cells, lambda cell, variant, name=name: cell.scores("composition", name, variant))
            some = next(iter(found.values()))[0]
            columns = {
                title: {row: [scores[key] for scores in seeds] for row, seeds in found.items()}
                for key, title in COMPOSITION.items()
                if key in some
            }
            for kind in some["by_type"]:
                columns[kind] = {
                    row: [scores["by_type"][kind]["accuracy"] for scores in seeds] for row, seeds in found.items()
                }
            tables.append(score_table(columns, "right", name, f"{some['pairs']} questions"))
    return _with_figure("composition", "Captions that differ little", tables, cells)


def routing(cells: Cells) -> Section | None:
    """First choices of the vision tower's tokens by expert, averaged over its MoE blocks (Figure 2 as numbers)."""
    shares = routing_shares(cells)
    if not shares:
        return None
    most = max(map(len, shares.values()))
    rows, parts = [], {f"expert {e}": [0.0] * len(shares) for e in range(most)}
    for number, (recipe, experts) in enumerate(shares.items()):
        rows.append([recipe, *map(mean_and_spread, experts), *[MISSING] * (most - len(experts))])
        for expert, seeds in enumerate(experts):
            parts[f"expert {expert}"][number] = statistics.mean(seeds)
    intro = "Share of the pictures' tokens whose first choice is an expert, over all blocks."
    bars = stacked_bars("routing", "first choices", list(shares), parts, "share of tokens")
    figure = Figure([bars], "Even routing gives every expert the same length.")
    return Section("routing", "Routing", [intro, Table(["recipe", *parts], rows), figure])


def routing_shares(cells: Cells) -> dict[str, list[list[float]]]:
    """Recipe -> for each expert its share by seed; only recipes whose result is a mixture."""
    found = {}
    for recipe, run in cells.items():
        if all(cell.results.get("routing") for cell in run):
            by_block = [zip(*cell.results["routing"]["vision"], strict=True) for cell in run]
            by_expert = [[statistics.mean(expert) for expert in experts] for experts in by_block]
            found[recipe] = [list(seeds) for seeds in zip(*by_expert, strict=True)]
    return found


def cost(cells: Cells) -> Section:
    """Training cost, parameters and inference cost (as the CLIP-FMoE page counts them), and the score against them."""
    rows = {recipe: _cost_cells(run) for recipe, run in cells.items()}
    head = ["recipe", *next(iter(rows.values()))]
    blocks = [_cost_intro(cells), Table(head, [[recipe, *row.values()] for recipe, row in rows.items()])]
    if claims := fmoe_claims(cells):
        blocks += [Table(["", "here", "paper"], claims, "CLIP-FMoE against CLIP-MoE", "by seed"), CLUSTERING_NOTE]
    scores = mean_of([{recipe: table.scores[recipe] for recipe in cells} for table in retrieval_tables(cells)])
    if scores:
        minutes, operations = by_seed(cells, lambda c: c.cost.seconds / 60), by_seed(cells, lambda c: c.flops / 1e12)
        panels = [
            cost_against_score("cost-time", "minutes after the base", minutes, scores),
            cost_against_score("cost-flops", "TFLOPs after the base", operations, scores),
        ]
        how = (
            "Up and to the left is better: a higher mean of all retrieval scores, for less. Bars: ± one standard "
            "deviation over seeds."
        )
        blocks.append(Figure(panels, how))
    return Section("cost", "Cost", blocks)


def _cost_cells(run: Sequence[Cell]) -> dict[str, str]:
    """Column -> what stands there of one recipe."""
    costs, parameters = [cell.cost for cell in run], run[0].results["parameters"]
    return {
        "steps": f"{costs[0].steps:,}",
        "samples": f"{costs[0].samples:,}",
        "training": _time([cost.train_seconds for cost in costs]),
        "features": duration(statistics.mean(cost.features for cost in costs)),
        "clusters": duration(statistics.mean(cost.clusters for cost in costs)),
        "all": _time([cost.seconds for cost in costs]),
        "training TFLOPs": f"{statistics.mean(cell.flops for cell in run) / 1e12:,.1f}",
        "peak memory": f"{max(cost.peak_memory for cost in costs) / 2**30:.2f} GiB",
        "parameters": millions(parameters["total"]),
        "active": millions(parameters["active"]),
        "vision MACs an image": f"{run[0].inference_macs / 1e9:.3f} G",
    }


def _time(seconds: Sequence[float]) -> str:
    spread = f" ± {duration(statistics.stdev(seconds))}" if len(seconds) > 1 and any(seconds) else ""
    return duration(statistics.mean(seconds)) + spread


def _cost_intro(cells: Cells) -> str:
    tokens = [cell.tokens for run in cells.values() for cell in run if cell.tokens is not None]
    how = (
        "Everything after the base, mean over seeds; evaluation is not counted. Times are a CPU's own where a run "
        "used nothing else, else the clock's. TFLOPs: 10¹² operations of a run, forward and backward through what "
        "needs a gradient, features included"
    )
    if not tokens:
        return f"{how}."
    if not all(one.measured for one in tokens):
        return f"{how}; captions at the text tower's whole context, as the data could not be read for their lengths."
    return f"{how}; captions at {tokens[0].padded:.0f} tokens, the mean length of a padded batch."
