"""What compressing a CLIP-MoE kept, as tables (terminal, Markdown) and as one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from . import figures
from .page import CSS, Html, figure, html, join, paragraph, table

KINDS = {"image": "image embedding", "text": "text embedding", "patches": "patches (hidden state -2)"}
SCORES = {"i2t_r1": "I2T R@1", "t2i_r1": "T2I R@1", "i2t_r5": "I2T R@5", "t2i_r5": "T2I R@5"}
Recalls = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Trial:
    """A compressed model: how it was made, what it keeps, what it scores."""

    rank: int | None
    energy: float | None
    calibrated: bool
    kept: list[dict[str, Any]]
    """Of every block and layer: block, layer, rank, and the energy kept of each expert's difference."""
    parameters: dict[str, int]
    vision_macs: int
    cosine: dict[str, dict[str, float]] | None
    """image, text, patches -> mean and min of the cosine with the full model's features."""
    retrieval: dict[str, dict[str, float]]

    @property
    def _energies(self) -> list[float]:
        return [share for one in self.kept for share in one["energy"][1:] or one["energy"]]  # the first is the base

    @property
    def energy_mean(self) -> float:
        return statistics.mean(self._energies)

    @property
    def energy_min(self) -> float:
        return min(self._energies)

    @property
    def ranks(self) -> str:
        """The rank of all differences, or its range."""
        found = sorted({one["rank"] for one in self.kept})
        return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"

    @property
    def lowest_cosine(self) -> float:
        """The lowest of the three mean cosines."""
        return min(one["mean"] for one in self.cosine.values())


def gaps(before: Recalls, after: Recalls) -> list[float]:
    """After minus before of every R@1 and R@5, in points."""
    return [100 * (after[name][score] - before[name][score]) for name in before for score in SCORES]


def best(trials: Sequence[Trial], before: Recalls, cosine: float, points: float) -> Trial | None:
    """The smallest rank whose features and retrieval are near enough to the full model's; of two alike, the one with
    the higher cosine. None where there is none."""
    good = [
        one for one in trials
        if one.lowest_cosine >= cosine and (not before or abs(statistics.mean(gaps(before, one.retrieval))) <= points)
    ]  # fmt: skip
    return min(good, key=lambda one: (one.rank, -one.lowest_cosine), default=None)


def verdict(report: Mapping[str, Any]) -> str:
    """One sentence: the smallest rank that is good enough."""
    limits, before = report["limits"], report["full"]["retrieval"]
    found = best([Trial(**one) for one in report["find"]], before, limits["cosine"], limits["points"])
    asked = f"feature cosine >= {limits['cosine']:g}"
    asked += f" and retrieval within {limits['points']:g} points" if before else " (retrieval was not measured)"
    if found is None:
        return f"No rank keeps {asked}."
    return (
        f"The smallest rank that keeps {asked}: {found.rank}, {'calibrated' if found.calibrated else 'plain'} "
        f"({_millions(found.parameters['total'])} parameters instead of "
        f"{_millions(report['full']['parameters']['total'])})."
    )


# ------------------------------------------------------------------------------------------------------------ tables


@dataclass(frozen=True)
class Grid:
    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{text}\n\n{self.note}" if self.note else text


def tables(report: Mapping[str, Any]) -> Iterator[Grid]:
    """The tables of compress.json's content."""
    if report["find"]:
        yield _find(report)
    if report["compressed"] is not None:
        trial = Trial(**report["compressed"])
        yield _size(report, trial)
        if trial.cosine is not None:
            yield _cosine(report, trial)
        if trial.retrieval:
            yield _retrieval(report["full"]["retrieval"], trial.retrieval)


def _find(report: Mapping[str, Any]) -> Grid:
    trials, full, checked = [Trial(**one) for one in report["find"]], report["full"], report["check"]
    head = ["rank", "SVD", "energy kept (lowest)", *(f"1 - cosine: {name}" for name in KINDS), "largest single"]
    head += ["retrieval (largest)"] * bool(full["retrieval"]) + ["parameters", "vision GMACs"]
    last = max(one.rank for one in trials)
    rows = []
    for one in trials:
        row = ["full" if one.rank == last else str(one.rank), "calibrated" if one.calibrated else "plain"]
        row += [f"{_percent(one.energy_mean)} ({_percent(one.energy_min)})"]
        row += [_away(one.cosine[kind]["mean"]) for kind in KINDS]
        row += [_away(min(found["min"] for found in one.cosine.values()))]
        if full["retrieval"]:
            moved = gaps(full["retrieval"], one.retrieval)
            row += [f"{statistics.mean(moved):+.2f} ({max(moved, key=abs):+.2f})"]
        rows.append([*row, _millions(one.parameters["total"]), _giga(dataclasses.asdict(one))])
    note = (
        "Energy: of the experts' differences to the base, calibrated as inputs weigh it (the two cannot be compared). "
        f"Cosine with the full model's features, mean over {checked['images']:,} pictures and "
        f"{checked['captions']:,} captions of {checked['source']}."
    )
    if full["retrieval"]:
        note += f" Retrieval: mean change of R@1 and R@5, both ways, in points, on {'; '.join(full['retrieval'])}."
    for name, one in (("The full model", full), ("A dense CLIP of this shape", report["dense"])):
        note += f" {name}: {_millions(one['parameters']['total'])} parameters, {_giga(one)} vision GMACs."
    return Grid("What each rank keeps", head, rows, note)


def _size(report: Mapping[str, Any], trial: Trial) -> Grid:
    three = (report["dense"], report["full"], dataclasses.asdict(trial))
    rows = [
        ["rank of the differences", "", "", trial.ranks],
        ["energy kept of them", "", "", f"{_percent(trial.energy_mean)} (lowest {_percent(trial.energy_min)})"],
        ["parameters", *(_millions(one["parameters"]["total"]) for one in three)],
        ["parameters a pair uses", *(_millions(one["parameters"]["active"]) for one in three)],
        ["vision tower, GMACs a picture", *map(_giga, three)],
    ]
    seen = report["calibration"] if trial.calibrated else None
    note = f"Cut for the inputs of {seen['images']:,} pictures and {seen['captions']:,} captions of {seen['source']}." \
        if seen else "Plain truncated SVD."  # fmt: skip
    return Grid("Size and cost", ["", "dense CLIP of this shape", "full", "compressed"], rows, note)


def _cosine(report: Mapping[str, Any], trial: Trial) -> Grid:
    seen = report["check"]
    found = {name: trial.cosine[kind] for kind, name in KINDS.items()}
    rows = [[name, f"{one['mean']:.6f}", f"{one['min']:.6f}"] for name, one in found.items()]
    note = f"{seen['images']:,} pictures and {seen['captions']:,} captions of {seen['source']}."
    return Grid("Cosine with the full model's features", ["feature", "mean", "lowest"], rows, note)


def _retrieval(before: Recalls, after: Recalls) -> Grid:
    rows = []
    for name in before:
        cells = [
            f"{_percent(before[name][score])} -> {_percent(after[name][score])} "
            f"({100 * (after[name][score] - before[name][score]):+.1f})"
            for score in SCORES
        ]
        rows.append([name, *cells])
    note = f"In percent, full -> compressed. Mean change {statistics.mean(gaps(before, after)):+.2f} points."
    return Grid("Retrieval", ["data", *SCORES.values()], rows, note)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _away(cosine: float) -> str:
    """1 - cosine, of which rounding leaves about 1e-7."""
    return f"{1 - cosine:.1e}" if 1 - cosine > 2e-7 else "0"


def _giga(system: Mapping[str, Any]) -> str:
    return f"{system['vision_macs'] / 1e9:,.3g}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


# -------------------------------------------------------------------------------------------------------------- page


def html_page(report: Mapping[str, Any]) -> str:
    """The whole file; the same report gives the same bytes."""
    title = f"{report['model']}, compressed"
    body = [
        f"<section><h2>{html(grid.title)}</h2>{table(grid.head, grid.rows, grid.title)}{paragraph(grid.note)}</section>"
        for grid in tables(report)
    ]
    lead = "Experts as one FFN a block and low-rank differences to it. Nothing was trained."
    if report["find"]:
        lead += f" {verdict(report)}"
        body.append(f"<section><h2>By rank</h2>{_by_rank(report)}</section>")
    if report["compressed"] is not None:
        maps = _heat_maps(Trial(**report["compressed"]))
        body.append(f"<section><h2>Energy kept, block by block</h2>{maps}</section>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html(title)}</title><style>{CSS}</style></head><body><header><h1>{html(title)}</h1>"
        f'<p class="lead">{html(lead)}</p></header><main>{join(*body)}</main></body></html>\n'
    )


def _heat_maps(trial: Trial) -> Html:
    panels = []
    for tower, name in (("vision_model", "image"), ("text_model", "text")):
        for layer in ("fc1", "fc2"):
            mine = [one for one in trial.kept if one["block"].startswith(tower) and one["layer"] == layer]
            if mine:
                panels.append(energy_map(f"{name}{layer}", f"{name} tower, {layer}", mine))
    how = (
        "Share of each expert's squared difference to the base FFN that its rank keeps, in percent; the base itself "
        "(expert 0) has no difference. Beside each block its rank."
    )
    return figure(panels, how)


def energy_map(name: str, title: str, kept: Sequence[Mapping[str, Any]]) -> str:
    """A row a block, a column an expert; colours reach from the lowest share to 1."""
    shares = np.array([one["energy"][1:] or one["energy"] for one in kept])
    rows, columns = shares.shape
    first = 1 if len(kept[0]["energy"]) > 1 else 0
    low = min(float(shares.min()), 0.999)
    with figures.style():
        drawn = Figure(figsize=(max(2.8, 0.65 * columns + 1.4), 0.9 + 0.21 * rows))
        axes = drawn.add_subplot()
        axes.set_title(title, loc="left")
        axes.set_xlabel("expert")
        axes.set_ylabel("block")
        axes.grid(visible=False)
        axes.pcolormesh(shares, cmap="viridis", vmin=low, vmax=1.0, edgecolors="none")
        for (row, column), share in np.ndenumerate(shares):
            red, green, blue, _ = matplotlib.colormaps["viridis"]((share - low) / (1 - low))
            ink = "#111111" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
            axes.text(column + 0.5, row + 0.5, _percent(share), ha="center", va="center", color=ink, fontsize=7.5)
        axes.set_xticks(np.arange(columns) + 0.5, [str(first + column) for column in range(columns)])
        labels = [f"{one['block'].rpartition('.')[2]}  (rank {one['rank']})" for one in kept]
        axes.set_yticks(np.arange(rows) + 0.5, labels)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.invert_yaxis()
        return figures.to_svg(drawn, name, f"energy kept, {title}")


def _by_rank(report: Mapping[str, Any]) -> Html:
    trials = [Trial(**one) for one in report["find"]]
    panels = [distance_by_rank(kind, title, trials, report["limits"]["cosine"]) for kind, title in KINDS.items()]
    how = "Lower is nearer to the full model; the dashed line is what was asked for. The last rank is the full one."
    return figure(panels, how)


def distance_by_rank(kind: str, title: str, trials: Sequence[Trial], asked: float) -> str:
    """1 - mean cosine with the full model, by rank; a line for the plain SVD, one for the calibrated."""
    with figures.style():
        drawn = Figure(figsize=(4.0, 2.8))
        axes = drawn.add_subplot()
        axes.set_title(title, loc="left")
        axes.set_xlabel("rank")
        axes.set_ylabel("1 - cosine")
        for number, calibrated in enumerate((False, True)):
            mine = [one for one in trials if one.calibrated is calibrated]
            if mine:
                # What is equal but for rounding lies on the lower edge: a logarithmic axis has no zero.
                away = [max(1 - one.cosine[kind]["mean"], 1e-7) for one in mine]
                axes.plot([one.rank for one in mine], away, color=figures.COLOURS[number], marker="o", markersize=4,
                          label="calibrated" if calibrated else "plain")  # fmt: skip
        axes.axhline(1 - asked, color=figures.COLOURS[5], linewidth=1, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_yscale("log")
        axes.legend(loc="best")
        return figures.to_svg(drawn, f"rank-{kind}", f"distance of the {title} to the full model, by rank")
